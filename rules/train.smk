# Stage 3. Inputs: results/datasets/<dataset>/dataset.json and its shards, the parent's checkpoint, and the settings.
# Outputs: results/config/<model>.yaml, and results/<model>.ckpt from one rule per entry of `models:`.


localrules:
    training_settings,


rule training_settings:
    output:
        "results/config/{model}.yaml",
    log:
        "results/logs/train/{model}-settings.log",
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    params:
        spec=lambda wildcards: canonical_json(arguments.settings_file(config, wildcards.model)),
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.configfile --spec {params.spec:q} --out {output:q}"


for name, model in config["models"].items():

    rule:
        name:
            f"train_{name}"
        input:
            manifest=f"{paths.dataset_directory(model['dataset'])}/dataset.json",
            # Training reads what the manifest lists; a shard matters only when it is gone.
            shards=ancient(paths.shard_paths(config, model["dataset"])),
            # Not ancient(): Snakemake does not look for reasons of its own to run a job below one that is about to run, and
            # then an ancient input is no reason either.
            settings=f"results/config/{name}.yaml",
            parent=arguments.parent_flag(config, name)[1:],
        output:
            paths.checkpoint_path(name),
        log:
            f"results/logs/train/{name}.log",
        conda:
            "../envs/train.yaml"
        # The result depends on the number of threads, so the trainer takes it from its settings.
        threads: training_threads(config, name)
        resources:
            mem_mb=training_memory_mb(config, name),
            runtime=1440,
            gpu=jobs.get_device_count(config, name),
        params:
            dataset=lambda wildcards, input: os.path.dirname(input.manifest),
            parent=arguments.parent_flag(config, name),
            # As configured: the resource `gpu` is clipped to what Snakemake was told there is, which would change the batch.
            devices=jobs.get_device_count(config, name),
            lineages=arguments.lineages_to_train_on(config, name),
            # Not an output: Snakemake deletes those of a failed job, and this is what the next try continues from.
            run=lineages.run_directory(config, name),
            lineage=lineages.model_lineage(config, name),
        # tee ignores the signals that end a job, so that the trainer can still say what it does about them. Slurm would kill
        # it at the end of its time: a twentieth before, it saves and ends, and the profile's next try goes on.
        shell:
            "exec > >(trap '' INT TERM USR1; exec tee {log:q}) 2>&1; exec python -m cxt.train"
            " --config {input.settings:q} --dataset-path {params.dataset:q} {params.parent:q}"
            " --devices {params.devices} --lineage {params.lineage} {params.lineages} --run-dir {params.run:q}"
            " --out {output:q}"
            " ${{SLURM_JOB_ID:+--wait-for-lock 20 --max-minutes $(( {resources.runtime} - {resources.runtime} / 20 ))}}"
