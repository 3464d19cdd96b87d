# Human negatives and pairs, split by prompt, with what leaked and what was double taken out.


rule negatives:
    input:
        plan.targets("negatives"),


rule extract_negatives:
    message:
        "Negatives of {wildcards.dataset}"
    input:
        rows="results/{dataset}/rows.parquet",
        evaluation=plan.evaluation_files,
        questions=plan.tasks_beside,
    output:
        negatives="results/{dataset}/negatives.parquet",
        pairs="results/{dataset}/pairs.parquet",
        prompts="results/{dataset}/prompts.parquet",
    params:
        questions=plan.option("questions"),
        settings=plan.params("negatives"),
        code=plan.code("negatives"),
    log:
        "results/{dataset}/logs/negatives.log",
    benchmark:
        "results/{dataset}/logs/negatives.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        "../../envs/datasets.yaml"
    shell:
        "python -m d2o negatives --settings {params.settings:q} --rows {input.rows} "
        "{params.questions} --output {output.negatives} 2>&1 | tee {log}"
