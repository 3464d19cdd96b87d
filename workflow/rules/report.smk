# Tables with intervals, figures and examples.


rule report:
    input:
        plan.targets("page"),


# The figures and tables of the paper, from the experiments that show them.
rule figure1:
    input:
        plan.showing("figure1"),


rule table1:
    input:
        plan.showing("table1"),


rule table2:
    input:
        plan.showing("table2"),


rule figure3:
    input:
        plan.showing("figure3"),


rule figure4:
    input:
        plan.showing("figure4"),


rule cards:
    input:
        plan.asked("card"),


rule write_report:
    message:
        "Report of {wildcards.experiment}"
    input:
        plan.report_inputs,
    output:
        html=report(
            "<page>",
            caption="../report/report.rst",
            category="{experiment}",
            labels={"what": "report"},
        ),
        table="<report_table>",
        wide=report(
            "<report_folder>/table.md",
            caption="../report/table.rst",
            category="{experiment}",
            labels={"what": "table"},
        ),
        methods=report(
            "<report_folder>/figures/methods.svg",
            caption="../report/figure.rst",
            category="{experiment}",
            labels={"what": "methods"},
        ),
        training=report(
            "<report_folder>/figures/training.svg",
            caption="../report/figure.rst",
            category="{experiment}",
            labels={"what": "training"},
        ),
    params:
        settings=plan.params("report"),
        code=plan.code("report"),
    log:
        "<reports>/logs/{experiment}.log",
    benchmark:
        "<reports>/logs/{experiment}.benchmark.tsv"
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
        "python -m d2o report --settings {params.settings:q} --results {resources.results:q} "
        "--output {output.html} 2>&1 | tee {log}"


rule write_card:
    message:
        "Card of {wildcards.method} (seed {wildcards.seed}) on {wildcards.model}"
    input:
        plan.card_inputs,
    output:
        "<card>",
    params:
        settings=plan.params("card"),
        code=plan.code("report.card"),
    log:
        "<run>/logs/card.log",
    benchmark:
        "<run>/logs/card.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=10,
        gpu=0,
        results=plan.settings.results,
    conda:
        plan.environment("report")
    localrule: True
    shell:
        "python -m d2o card --settings {params.settings:q} --results {resources.results:q} "
        "--output {output} 2>&1 | tee {log}"
