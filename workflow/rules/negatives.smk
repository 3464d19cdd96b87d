# Human negatives and pairs, split by prompt, without leaks and duplicates.


rule negatives:
    input:
        plan.targets("negatives"),


rule extract_negatives:
    message:
        "Negatives of {wildcards.dataset}"
    input:
        rows="<rows>",
        evaluation=plan.evaluation_files,
    output:
        negatives="<negatives>",
        pairs="<pairs>",
        prompts="<prompts>",
    params:
        settings=plan.params("negatives"),
        code=plan.code("negatives"),
    log:
        "<data>/logs/negatives.log",
    benchmark:
        "<data>/logs/negatives.benchmark.tsv"
    # A job with several threads waits until other jobs leave it the cores, and every training waits for this one.
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        execution=plan.execution("negatives"),
    conda:
        plan.environment("datasets")
    shell:
        "POLARS_MAX_THREADS={threads} python -m d2o negatives --settings {params.settings:q} --rows {input.rows} "
        "--execution {resources.execution:q} --output {output.negatives} 2>&1 | tee {log}"
