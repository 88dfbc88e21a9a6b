# The front door: read and check the configuration, include the rules, name the targets.
#
#     snakemake --cores 2 results/broad_w200.ckpt     one checkpoint, and exactly what it needs
#     snakemake --cores 2                             all checkpoints and their evaluation
#
# README.md explains, config/README.md describes every key.

from pathlib import Path

from snakemake.utils import min_version

min_version("9.20")

ROOT = Path(str(workflow.current_basedir)).resolve()


include: "rules/package.smk"


# An absolute path, so that `--directory elsewhere` finds it too.
configfile: str(default_configfile())


report: "workflow/report/workflow.rst"


include: "rules/common.smk"


# The first rule, and so the default target.
rule all:
    input:
        [paths.checkpoint_path(model) for model in config["models"]],
        [f"results/evaluation/{name}.json" for name in jobs.list_evaluations(config)],
        [f"results/report/{model}-training.png" for model in config["models"]],
        [
            f"results/translate/{name}/{file}"
            for name in config["translate"]
            for file in ("summary.json", "tracks.tsv.gz", "tracks.zarr", "ne.csv", "tracks.png")
        ],
        ["results/evaluation/table.md", "results/report/cost.html"]
        if jobs.evaluated_models(config)
        else [],


include: "rules/settings.smk"
include: "rules/simulate.smk"
include: "rules/preprocess.smk"
include: "rules/parents.smk"
include: "rules/teach.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/translate.smk"
