# Stage 1. Inputs: a genetic map in stdpopsim's cache, for scenarios that have one.
# Outputs: results/simulations/<leaf>/<start>.trees.batch, one file per batch.

# One rule for each genetic map that is not in the cache yet; one that is there is an input that no rule makes, so that
# Snakemake never deletes it. Local, because nodes of a cluster often have no network.
for path, spec in jobs.maps_to_fetch(config).items():

    rule:
        name:
            f"genetic_map_{spec['species']}_{spec['genetic_map']}"
        output:
            path,
        log:
            f"results/logs/simulate/map-{spec['species']}-{spec['genetic_map']}.log",
        localrule: True
        conda:
            "../envs/simulate.yaml"
        params:
            species=spec["species"],
            genetic_map=spec["genetic_map"],
            scenario=spec["name"],
        shell:
            "exec &> {log:q}; exec python -m cxt.catalogue"
            " --species {params.species:q} --genetic-map {params.genetic_map:q} --scenario {params.scenario:q}"


rule simulate:
    input:
        genetic_map=map_of_batch,
    output:
        "results/simulations/{leaf}/{start}.trees.batch",
    log:
        "results/logs/simulate/{leaf}-{start}.log",
    conda:
        "../envs/simulate.yaml"
    threads: 1
    resources:
        mem_mb=simulate_memory,
        runtime=simulate_minutes,
        gpu=0,
    params:
        spec=simulate_spec,
        simulations=batch_count,
        seed=config["seed"],
        lineage=batch_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.simulate"
        " --spec {params.spec:q} --start {wildcards.start} --count {params.simulations} --seed {params.seed}"
        " --out {output:q}"
