# Stage 3, for models with a teacher. Inputs: the teacher's checkpoint, the shards of the model's dataset, and, if the teacher reads
# more haplotypes than they hold, the simulation batch they were made from.
# Outputs: results/soft_targets/<model>/{train,test}/<variant>-<start>.npz.


rule teach:
    input:
        settings="results/settings/teachings/{model}.yaml",
        checkpoint=lambda wildcards: paths.teacher_path(config, wildcards.model),
        base=base_of_teacher,
        shards=taught_shards,
        batch=teacher_batch,
    output:
        "results/soft_targets/{model}/train/{variant}-{start}.npz",
        "results/soft_targets/{model}/test/{variant}-{start}.npz",
    log:
        "results/logs/teach/{model}/{variant}-{start}.log",
    benchmark:
        "results/benchmarks/teach/{model}/{variant}-{start}.tsv"
    conda:
        "../envs/evaluate.yaml"
    threads: lambda wildcards: build_training_config(config, wildcards.model).threads
    resources:
        **gpu_resources(evaluation_devices),
        mem_mb=lambda wildcards: teaching_memory_mb(config, wildcards.model, batch_count(wildcards)),
        runtime=240,
        nodes=1,
    params:
        batch=teacher_batch_flags,
        devices=lambda wildcards, resources: resources.get("gpu", evaluation_devices(wildcards)),
        # Rounding depends on it, so that it comes from the settings, not from the cores that there are.
        threads=lambda wildcards: build_training_config(config, wildcards.model).threads,
        lineage=soft_target_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.teach"
        " --config {input.settings:q} --checkpoint {input.checkpoint:q} --shards {input.shards:q} {params.batch:q}"
        " --devices {params.devices} --threads {params.threads} --lineage {params.lineage} --out {output:q}"
