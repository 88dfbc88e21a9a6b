# Stage 1. Inputs: for scenarios with a genetic map, results/maps/<species>-<map>.json.
# Outputs: results/simulations/<variant>/<start>.trees.batch, one file per batch.


# Local, because machines of a cluster often have no network: they find the map in stdpopsim's cache.
rule genetic_map:
    output:
        "results/maps/{map}.json",
    log:
        "results/logs/simulate/map-{map}.log",
    localrule: True
    conda:
        "../envs/simulate.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
        gpu=0,
    params:
        species=lambda wildcards: map_spec(wildcards)["species"],
        genetic_map=lambda wildcards: map_spec(wildcards)["genetic_map"],
        scenario=lambda wildcards: map_spec(wildcards)["name"],
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.catalogue --species {params.species:q}"
        " --genetic-map {params.genetic_map:q} --scenario {params.scenario:q} --out {output:q}"


rule simulate:
    input:
        settings="results/settings/simulations/{variant}.yaml",
        genetic_map=find_batch_map,
        # The user's own files are where they are, also with a storage provider.
        trees=lambda wildcards: list(map(local, tree_files(wildcards))),
    output:
        "results/simulations/{variant}/{start}.trees.batch",
    log:
        "results/logs/simulate/{variant}-{start}.log",
    benchmark:
        "results/benchmarks/simulate/{variant}-{start}.tsv"
    conda:
        "../envs/simulate.yaml"
    threads: 1
    resources:
        mem_mb=simulate_memory,
        runtime=simulate_minutes,
        gpu=0,
    params:
        simulations=batch_count,
        # Of everything that the result depends on. If it changes, Snakemake runs the job again.
        lineage=batch_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.simulate"
        " --config {input.settings:q} --start {wildcards.start} --count {params.simulations}"
        " --lineage {params.lineage} --out {output:q}"
