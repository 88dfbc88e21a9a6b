# After stage 3, for the entries of `translate:`. Inputs: the files of genotypes, masks and tables that an entry names, and the checkpoint.
# Outputs: results/translate/<name>/. What is done so far is in a directory there, which is no output.


# One job reads the genotypes, and the jobs of the parts find them in the work directory. The files that say that a step is done are
# temporary: they go with the work directory.
rule translate_read:
    input:
        settings="results/settings/translations/{translation}.yaml",
        checkpoint=translation_checkpoint,
        files=lambda wildcards: translations.list_translation_files(config, wildcards.translation),
    output:
        temp("results/translation_steps/{translation}/read"),
    log:
        "results/logs/translate/{translation}/read.log",
    benchmark:
        "results/benchmarks/translate/{translation}-read.tsv"
    conda:
        "../envs/translate.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=720,
        gpu=0,
    params:
        directory=lambda wildcards: f"results/translate/{wildcards.translation}",
        bigwig=translation_bigwig,
        lineage=lambda wildcards: translations.translation_lineage(config, wildcards.translation),
    shell:
        "exec &> {log:q}; python -m cxt.commands.translate --config {input.settings:q} --out {params.directory:q}"
        " --step read --force {params.bigwig} --threads {threads} && touch {output:q}"


rule translate_blocks:
    input:
        settings="results/settings/translations/{translation}.yaml",
        read="results/translation_steps/{translation}/read",
    output:
        temp("results/translation_steps/{translation}/part-{part}-of-{parts}"),
    log:
        "results/logs/translate/{translation}/part-{part}-of-{parts}.log",
    benchmark:
        "results/benchmarks/translate/{translation}-part-{part}-of-{parts}.tsv"
    conda:
        "../envs/translate.yaml"
    threads: 1
    resources:
        **gpu_resources(translation_devices),
        mem_mb=6000,
        runtime=1440,
        nodes=1,
    params:
        directory=lambda wildcards: f"results/translate/{wildcards.translation}",
        device=lambda wildcards, resources: (
            "cuda" if resources.get("gpu", translation_devices(wildcards)) else "cpu"
        ),
        lineage=lambda wildcards: translations.translation_lineage(config, wildcards.translation),
    shell:
        "exec &> {log:q}; python -m cxt.commands.translate --config {input.settings:q} --out {params.directory:q}"
        " --step blocks --part {wildcards.part}/{wildcards.parts} --device {params.device} --threads {threads}"
        " && touch {output:q}"


# All steps once more: what is done is kept, and what was lost in an accident is made again. The table's index is no output, since
# its name depends on the lengths of the contigs: .tbi, or .csi beyond 2^29 bp.
rule translate:
    input:
        settings="results/settings/translations/{translation}.yaml",
        parts=translation_parts,
    output:
        summary="results/translate/{translation}/summary.json",
        table="results/translate/{translation}/tracks.tsv.gz",
        tracks=directory("results/translate/{translation}/tracks.zarr"),
        ne="results/translate/{translation}/ne.csv",
    log:
        "results/logs/translate/{translation}/finish.log",
    benchmark:
        "results/benchmarks/translate/{translation}.tsv"
    conda:
        "../envs/translate.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=720,
        gpu=0,
    params:
        directory=lambda wildcards: f"results/translate/{wildcards.translation}",
        bigwig=translation_bigwig,
        lineage=lambda wildcards: translations.translation_lineage(config, wildcards.translation),
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.translate --config {input.settings:q} --out {params.directory:q}"
        " --force --device cpu {params.bigwig} --threads {threads}"


rule translation_figures:
    input:
        summary="results/translate/{translation}/summary.json",
        tracks="results/translate/{translation}/tracks.zarr",
    output:
        report(
            multiext(
                "results/translate/{translation}/",
                "tracks.png",
                "pairs.png",
                "distribution.png",
                "ne.png",
            ),
            caption="../workflow/report/translation.rst",
            category="Translations",
            labels={"translation": "{translation}"},
        ),
    log:
        "results/logs/translate/{translation}/figures.log",
    conda:
        "../envs/translate.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
        gpu=0,
    params:
        directory=lambda wildcards: f"results/translate/{wildcards.translation}",
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.plot {params.directory:q}"
