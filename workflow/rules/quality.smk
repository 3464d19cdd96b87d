# A data set's human pairs, scored and judged as a model's answers are, and drawn: Figure 1.


rule quality:
    input:
        plan.targets("quality"),


rule sample_pairs:
    message:
        "Human pairs of {wildcards.dataset}"
    input:
        pairs="results/{dataset}/pairs.parquet",
    output:
        prompts="results/{dataset}/quality/prompts.parquet",
        chosen="results/{dataset}/quality/chosen.parquet",
        rejected="results/{dataset}/quality/rejected.parquet",
    params:
        settings=plan.params("quality"),
        code=plan.code("quality"),
    log:
        "results/{dataset}/quality/logs/sample.log",
    benchmark:
        "results/{dataset}/quality/logs/sample.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        "../../envs/datasets.yaml"
    shell:
        "python -m d2o quality --settings {params.settings:q} --pairs {input.pairs} "
        "--output {output.prompts} 2>&1 | tee {log}"


use rule score_responses as score_pairs with:
    message:
        "Scores by {wildcards.reward} of the {wildcards.side} answers of {wildcards.dataset}"
    input:
        reward=plan.reward_model,
        sources=plan.rule_files,
        prompts="results/{dataset}/quality/prompts.parquet",
        responses="results/{dataset}/quality/{side}.parquet",
    output:
        "results/{dataset}/quality/scores/{reward}/{side}.parquet",
    log:
        "results/{dataset}/quality/logs/scores-{reward}-{side}.log",
    benchmark:
        "results/{dataset}/quality/logs/scores-{reward}-{side}.benchmark.tsv"


use rule judge_responses as judge_pairs with:
    message:
        "Verdicts of {wildcards.judge} on the human pairs of {wildcards.dataset}"
    input:
        prompts="results/{dataset}/quality/prompts.parquet",
        initial="results/{dataset}/quality/rejected.parquet",
        responses="results/{dataset}/quality/chosen.parquet",
    output:
        "results/{dataset}/quality/judge/{judge}.parquet",
    log:
        "results/{dataset}/quality/logs/judge-{judge}.log",
    benchmark:
        "results/{dataset}/quality/logs/judge-{judge}.benchmark.tsv"


rule draw_pairs:
    message:
        "Figure 1 of {wildcards.experiment}"
    input:
        plan.quality_inputs,
    output:
        figure=report(
            "results/reports/{experiment}/figures/quality.svg",
            caption="../report/quality.rst",
            category="{experiment}",
            labels={"what": "human pairs"},
        ),
        table="results/reports/{experiment}/quality.csv",
    params:
        settings=plan.params("report"),
        code=plan.code("report"),
    log:
        "results/reports/logs/{experiment}-quality.log",
    benchmark:
        "results/reports/logs/{experiment}-quality.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=0,
    conda:
        "../../envs/report.yaml"
    shell:
        "python -m d2o figure1 --settings {params.settings:q} --output {output.figure} 2>&1 | tee {log}"
