# What each job is to do, decided when the workflow is planned. Output: results/settings/<kind>/<name>.yaml.


# Written by the main process, before the jobs that read them are submitted. A job computes the lineage of what it has read
# and refuses to write anything if the configuration, which Snakemake reads anew when a job starts, gives another one.
rule settings:
    output:
        "results/settings/{kind}/{name}.yaml",
    log:
        "results/logs/settings/{kind}/{name}.log",
    localrule: True
    conda:
        "../envs/simulate.yaml"
    threads: 1
    resources:
        mem_mb=100,
        runtime=5,
        gpu=0,
    params:
        text=lambda wildcards: settings.write_settings(config, wildcards.kind, wildcards.name),
    shell:
        "exec 2> {log:q}; printf '%s' {params.text:q} > {output:q}.part && mv {output:q}.part {output:q}"
