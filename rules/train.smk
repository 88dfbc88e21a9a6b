# Stage 3. Inputs: results/datasets/<dataset>/dataset.json and its shards, the parent's checkpoint, and the settings.
# Outputs: results/<model>.ckpt; of a finished run, also the log of its steps.


rule train:
    input:
        settings="results/settings/models/{model}.yaml",
        manifest=lambda wildcards: manifest_of(wildcards.model),
        # Training reads what the manifest lists; a shard matters only when it is gone.
        shards=lambda wildcards: ancient(shards_of(wildcards.model)),
        parent=checked_parent,
        soft_targets=lambda wildcards: paths.soft_target_paths(config, wildcards.model),
    output:
        "results/{model}.ckpt",
    log:
        text="results/logs/train/{model}.log",
        steps="results/logs/train/{model}.csv",
    benchmark:
        "results/benchmarks/train/{model}.tsv"
    wildcard_constraints:
        model=one_of(models_by_machines(several=False)),
    conda:
        "../envs/train.yaml"
    # The result depends on the number of threads, so the trainer takes it from its settings.
    threads: lambda wildcards: training_threads(config, wildcards.model)
    resources:
        **gpu_resources(training_devices),
        mem_mb=lambda wildcards: training_memory_mb(config, wildcards.model),
        runtime=lambda wildcards: training_minutes(config, wildcards.model),
        nodes=1,
    params:
        dataset=dataset_flag,
        parent=parent_flag,
        soft_targets=soft_target_flag,
        # Snakemake does not compare params that depend on `output`: these settings change no result.
        neutral=lambda wildcards, output: settings.neutral_training_flags(config, wildcards.model),
        launch=launcher,
        # Not an output: Snakemake deletes those of a failed job, and this is what the next try continues from.
        run=lambda wildcards, output: lineages.run_directory(config, wildcards.model),
        # A shorter training of the same settings, whose training state is the beginning of this one.
        prolong=prolong_flag,
        find_runs=find_runs,
        tries=log_of_tries,
        note=note_on_lost_machine,
        # Of everything that the result depends on. If it changes, Snakemake runs the job again.
        lineage=lambda wildcards: lineages.model_lineage(config, wildcards.model),
    # tee ignores the signals that end a job, so that the trainer can still say what it does about them. In a Slurm allocation
    # the trainer saves and ends before its time is up, and the profile's next try continues; there it also waits for a trainer
    # that is still running, as after Snakemake was killed.
    shell:
        "{params.find_runs} 2>&1 | tee {log.text:q} >&2;"
        " exec > >(trap '' INT TERM USR1; tee -a {params.tries:q} | exec tee {log.text:q}) 2>&1;"
        ' echo "--- $(date -Is) $(hostname) ${{SLURM_JOB_ID:-}}"; [ -z {params.note:q} ] || echo {params.note:q};'
        " exec {params.launch:q} python -m cxt.train"
        " --config {input.settings:q} {params.dataset:q} {params.parent:q} {params.soft_targets:q}"
        " {params.neutral:q} {params.prolong:q}"
        " --lineage {params.lineage} --run-dir {params.run:q} --log-out {log.steps:q} --out {output:q}"
        " ${{SLURM_JOB_ID:+--wait-for-lock 100000}}"


if models_by_machines(several=True):

    # Several machines train a model together: its job gets them from Slurm, and starts one trainer on each.
    use rule train as train_on_machines with:
        wildcard_constraints:
            model=one_of(models_by_machines(several=True)),
        resources:
            **machine_resources(),
            mem_mb=lambda wildcards: training_memory_mb(config, wildcards.model),
            runtime=lambda wildcards: training_minutes(config, wildcards.model),
