# Stage 2. Inputs: results/simulations/<variant>/<start>.trees.batch, and the accessibility mask of a dataset that has one.
# Outputs: results/datasets/<dataset>/{train,test}/<variant>-<start>.zarr.zip and results/datasets/<dataset>/dataset.json.


rule synthetic_mask:
    input:
        settings="results/settings/masks/{dataset}.yaml",
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
        lineage=lambda wildcards: lineages.mask_lineage(config, wildcards.dataset),
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess mask"
        " --config {input.settings:q} --lineage {params.lineage} --out {output:q}"


rule preprocess:
    input:
        settings="results/settings/datasets/{dataset}.yaml",
        batch="results/simulations/{variant}/{start}.trees.batch",
        mask=lambda wildcards: mask_of_dataset(wildcards.dataset),
    output:
        train="results/datasets/{dataset}/train/{variant}-{start}.zarr.zip",
        test="results/datasets/{dataset}/test/{variant}-{start}.zarr.zip",
    log:
        "results/logs/preprocess/{dataset}/{variant}-{start}.log",
    benchmark:
        "results/benchmarks/preprocess/{dataset}/{variant}-{start}.tsv"
    conda:
        "../envs/preprocess.yaml"
    threads: 1
    resources:
        mem_mb=preprocess_memory,
        runtime=60,
        gpu=0,
    params:
        simulations=batch_count,
        mask=mask_flag,
        batch_lineage=batch_lineage,
        lineage=shard_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess shard"
        " --config {input.settings:q} --batch {input.batch:q} --scenario {wildcards.variant:q}"
        " --start {wildcards.start} --count {params.simulations} {params.mask:q}"
        " --batch-lineage {params.batch_lineage} --lineage {params.lineage}"
        " --train {output.train:q} --test {output.test:q}"


rule manifest:
    input:
        settings="results/settings/shards/{dataset}.yaml",
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
        dataset=lambda wildcards, output: os.path.dirname(output[0]),
        lineage=lambda wildcards: lineages.dataset_lineage(config, wildcards.dataset),
    shell:
        "exec &> {log:q}; exec python -m cxt.preprocess manifest"
        " --config {input.settings:q} --dataset {params.dataset:q} --lineage {params.lineage}"
