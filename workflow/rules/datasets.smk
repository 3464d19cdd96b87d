# Preference rows of any format in one table.


rule datasets:
    input:
        plan.targets("rows"),


rule read_dataset:
    message:
        "Rows of {wildcards.dataset}"
    input:
        files=plan.dataset_files,
    output:
        "<rows>",
    params:
        settings=plan.params("datasets"),
        code=plan.code("datasets"),
    log:
        "<data>/logs/rows.log",
    benchmark:
        "<data>/logs/rows.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        execution=plan.execution("datasets"),
    conda:
        plan.environment("datasets")
    localrule: True
    shell:
        "python -m d2o datasets --settings {params.settings:q} --execution {resources.execution:q} --output {output} 2>&1 | tee {log}"
