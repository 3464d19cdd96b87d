# Human evaluation: a blind page for each annotator, and the verdicts that annotators return.


rule human_eval:
    input:
        plan.asked("human_pages"),


rule write_human_pages:
    message:
        "Pages of {wildcards.experiment} for annotators"
    input:
        plan.compared_by_people,
    output:
        key="<human_key>",
        pages="<human_pages>",
    params:
        settings=plan.params("human_eval"),
        code=plan.code("human_eval"),
    log:
        "<human_eval>/logs/pages.log",
    benchmark:
        "<human_eval>/logs/pages.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        results=plan.settings.results,
    conda:
        plan.environment("report")
    localrule: True
    shell:
        "python -m d2o human-eval --settings {params.settings:q} --results {resources.results:q} "
        "--key {output.key} --output {output.pages} 2>&1 | tee {log}"


rule read_human_verdicts:
    message:
        "Verdicts of the annotators of {wildcards.experiment}"
    input:
        key="<human_key>",
        answers=plan.annotations,
    output:
        "<human_verdicts>",
    params:
        settings=plan.params("human_verdicts"),
        code=plan.code("human_eval"),
    log:
        "<human_eval>/logs/verdicts.log",
    benchmark:
        "<human_eval>/logs/verdicts.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
        answers=plan.annotated,
    conda:
        plan.environment("report")
    localrule: True
    shell:
        "python -m d2o human-verdicts --settings {params.settings:q} --key {input.key} --answers {resources.answers:q} "
        "--output {output} 2>&1 | tee {log}"
