# Tables with intervals, figures and examples.


rule report:
    input:
        plan.targets("page"),


# What the paper shows, from the experiments that show it.
for exhibit in ("figure1", "table1", "table2", "figure3", "figure4"):

    rule:
        input:
            plan.showing(exhibit),
        name:
            exhibit


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
        table="<report_folder>/table.csv",
        wide=report(
            "<report_folder>/table.md",
            caption="../report/table.rst",
            category="{experiment}",
            labels={"what": "table"},
        ),
        methods=report(
            "<report_folder>/figures/methods.svg",
            caption="../report/methods.rst",
            category="{experiment}",
            labels={"what": "methods"},
        ),
        training=report(
            "<report_folder>/figures/training.svg",
            caption="../report/training.rst",
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
