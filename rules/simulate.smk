# Stage 1. Inputs: none. Outputs: results/simulations/<leaf>/<start>.trees.batch, one file per batch.


rule simulate:
    output:
        "results/simulations/{leaf}/{start}.trees.batch",
    log:
        "results/logs/simulate/{leaf}-{start}.log",
    conda:
        "../envs/simulate.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=0,
    params:
        spec=simulate_spec,
        simulations=batch_count,
        seed=config["seed"],
        lineage=batch_lineage,
    shell:
        "exec &> {log:q}; exec python -m cxt.simulate"
        " --spec {params.spec:q} --start {wildcards.start} --count {params.simulations} --seed {params.seed}"
        " --out {output:q}"
