# Stage 2. Inputs: results/simulations/<variant>/<start>.trees.batch, and the accessibility mask of a dataset that has one.
# Outputs: results/datasets/<dataset>/{train,test}/<variant>-<start>.zarr.zip and results/datasets/<dataset>/dataset.json.


rule synthetic_mask:
    output:
        "results/masks/{dataset}.npz",
    log:
        "results/logs/preprocess/mask-{dataset}.log",
    conda:
        "../envs/preprocess.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
        gpu=0,
    params:
        spec=lambda wildcards: canonical_json(jobs.mask_spec(config, wildcards.dataset)),
        seed=config["seed"],
        lineage=lambda wildcards: lineages.mask_lineage(config, wildcards.dataset),
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess mask"
        " --spec {params.spec:q} --seed {params.seed} --lineage {params.lineage} --out {output:q}"


rule preprocess:
    input:
        batch="results/simulations/{variant}/{start}.trees.batch",
        mask=lambda wildcards: mask_of_dataset(wildcards.dataset),
    output:
        "results/datasets/{dataset}/{split}/{variant}-{start}.zarr.zip",
    log:
        "results/logs/preprocess/{dataset}/{split}-{variant}-{start}.log",
    conda:
        "../envs/preprocess.yaml"
    threads: 1
    resources:
        mem_mb=preprocess_memory,
        runtime=60,
        gpu=0,
    params:
        spec=shard_spec,
        simulations=batch_count,
        seed=config["seed"],
        mask=lambda wildcards: mask_flags(wildcards.dataset),
        batch_lineage=batch_lineage,
        lineage=shard_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess shard"
        " --batch {input.batch:q} --scenario {wildcards.variant:q} --seed {params.seed}"
        " --start {wildcards.start} --count {params.simulations} --split {wildcards.split}"
        " --spec {params.spec:q} {params.mask:q} --batch-lineage {params.batch_lineage}"
        " --lineage {params.lineage} --out {output:q}"


rule manifest:
    input:
        shards=lambda wildcards: paths.shard_paths(config, wildcards.dataset),
    output:
        "results/datasets/{dataset}/dataset.json",
    log:
        "results/logs/preprocess/{dataset}/manifest.log",
    conda:
        "../envs/preprocess.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    params:
        shards=lambda wildcards: canonical_json(
            lineages.variant_table_with_lineages(config, wildcards.dataset)
        ),
        dataset=lambda wildcards, output: os.path.dirname(output[0]),
        lineage=lambda wildcards: lineages.dataset_lineage(config, wildcards.dataset),
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess manifest"
        " --dataset {params.dataset:q} --shards {params.shards:q}"
