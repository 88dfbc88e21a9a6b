# Stage 4. Inputs: results/<model>.ckpt, or those of the members of an ensemble, evaluation simulations, and the accessibility mask of
# its dataset if it has one. Outputs: results/evaluation/<model>.json, three figures, and results/evaluation/table.md.


rule evaluate:
    input:
        settings="results/settings/evaluations/{model}.yaml",
        checkpoint=lambda wildcards: [
            paths.checkpoint_path(member) for member in list_members(config, wildcards.model)
        ],
        base=lambda wildcards: [
            base for member in list_members(config, wildcards.model) for base in base_of(member)
        ],
        batches=lambda wildcards: [
            paths.batch_path(batch["scenario"], batch["start"])
            for batch in lineages.evaluation_batches(config, wildcards.model)
        ],
        mask=lambda wildcards: mask_of_dataset(jobs.evaluation_dataset(config, wildcards.model)),
    output:
        figures="results/evaluation/{model}.json",
        tracks=report(
            "results/evaluation/{model}-tracks.png",
            caption="../workflow/report/tracks.rst",
            category="Accuracy",
            labels={"checkpoint": "{model}", "figure": "tracks"},
        ),
        scatter=report(
            "results/evaluation/{model}-scatter.png",
            caption="../workflow/report/scatter.rst",
            category="Accuracy",
            labels={"checkpoint": "{model}", "figure": "scatter"},
        ),
        calibration=report(
            "results/evaluation/{model}-calibration.png",
            caption="../workflow/report/calibration.rst",
            category="Accuracy",
            labels={"checkpoint": "{model}", "figure": "calibration"},
        ),
    log:
        "results/logs/evaluate/{model}.log",
    benchmark:
        "results/benchmarks/evaluate/{model}.tsv"
    wildcard_constraints:
        model=one_of([*config["models"], *list_ensembles(config)]),
    conda:
        "../envs/evaluate.yaml"
    threads: evaluation_threads
    resources:
        **gpu_resources(evaluation_devices),
        mem_mb=lambda wildcards: evaluation_memory_mb(config, wildcards.model),
        runtime=240,
        nodes=1,
    params:
        # Of the directory that holds the batches of all variants.
        simulations=lambda wildcards, input: os.path.dirname(os.path.dirname(input.batches[0])),
        mask=mask_flag,
        # Without GPUs (`--resources gpu=0`), it decodes on the CPU, which differs by rounding only; training would differ more.
        devices=lambda wildcards, resources: resources.get("gpu", evaluation_devices(wildcards)),
        threads=evaluation_threads,
        prefix=lambda wildcards, output: output.figures.removesuffix(".json"),
        # Not an output: what a checkpoint of the same bytes was evaluated to before, which is then published again.
        finished=lambda wildcards, output: "results/evaluation/finished",
        # Not compared either, for the lineage has all of it.
        ensemble=ensemble_flag,
        checkpoint_lineage=lambda wildcards: " ".join(
            lineages.model_lineage(config, member)
            for member in list_members(config, wildcards.model)
        ),
        lineage=lambda wildcards: lineages.evaluation_lineage(config, wildcards.model),
    shell:
        "exec > >(trap '' INT TERM USR1; exec tee {log:q}) 2>&1; exec python -m cxt.evaluate"
        " --config {input.settings:q} --checkpoint {input.checkpoint:q} {params.ensemble:q}"
        " --simulations {params.simulations:q} {params.mask:q}"
        " --devices {params.devices} --threads {params.threads} --checkpoint-lineage {params.checkpoint_lineage}"
        " --lineage {params.lineage} --out {output.figures:q} --figures {params.prefix:q}"
        " --finished {params.finished:q}"


rule accuracy_table:
    input:
        [f"results/evaluation/{name}.json" for name in jobs.list_evaluations(config)],
    output:
        "results/evaluation/table.md",
    log:
        "results/logs/table.log",
    localrule: True
    conda:
        "../envs/evaluate.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    params:
        lineage=lambda wildcards: lineages.table_lineage(config),
    shell:
        "exec &> {log:q}; exec python -m cxt.evaluate --table {input:q} --lineage {params.lineage} --out {output:q}"


rule training_curves:
    input:
        steps="results/logs/train/{model}.csv",
    output:
        report(
            "results/report/{model}-training.png",
            caption="../workflow/report/training.rst",
            category="Training",
            labels={"checkpoint": "{model}", "figure": "training"},
        ),
    log:
        "results/logs/report/{model}.log",
    localrule: True
    conda:
        "../envs/evaluate.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.runs --curves {input.steps:q} --out {output:q}"


rule report_tables:
    input:
        accuracy="results/evaluation/table.md",
        datasets=[f"{paths.dataset_directory(dataset)}/dataset.json" for dataset in used_datasets()],
    output:
        accuracy=report(
            "results/report/accuracy.html",
            caption="../workflow/report/table.rst",
            category="Accuracy",
            labels={"checkpoint": "all", "figure": "table"},
        ),
        datasets=report(
            "results/report/datasets.html",
            caption="../workflow/report/datasets.rst",
            category="Datasets",
            labels={"table": "datasets"},
        ),
        cost=report(
            "results/report/cost.html",
            caption="../workflow/report/cost.rst",
            category="Cost",
            labels={"table": "stages"},
        ),
    log:
        "results/logs/report/tables.log",
    localrule: True
    conda:
        "../envs/evaluate.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    params:
        directory=lambda wildcards, output: os.path.dirname(output.cost),
        benchmarks=lambda wildcards, output: os.path.normpath(f"{output.cost}/../../benchmarks"),
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.report --accuracy {input.accuracy:q} --datasets {input.datasets:q}"
        " --benchmarks {params.benchmarks:q} --out {params.directory:q}"
