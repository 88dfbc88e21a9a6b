# Before stage 3, for models that start or learn from a file. Output: results/parents/<name>-<start of the file's sha256>.ckpt, a copy of a
# checkpoint of cxt, or an import of a file of the original package.


# The file is no input, so that the same bytes in another place start no job; other bytes have another output.
rule import_parent:
    output:
        "results/parents/{parent}.ckpt",
    log:
        "results/logs/parents/{parent}.log",
    localrule: True
    conda:
        "../envs/evaluate.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
        gpu=0,
    params:
        # Snakemake does not compare params that depend on `output`.
        source=lambda wildcards, output: os.path.abspath(
            paths.parent_sources(config)[wildcards.parent]
        ),
        # Of everything that the copy depends on.
        lineage=lambda wildcards: lineages.parent_file_digest(config, wildcards.parent),
    shell:
        "exec &> {log:q}; exec python -m cxt.commands.checkpoint import {params.source:q}"
        " --as-parent {params.lineage} --out {output:q}"
