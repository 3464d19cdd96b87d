"""The experiment: human negatives in; an aligned model, its baselines and a report out."""

import locale
import os
import sys

if (encoding := locale.getpreferredencoding(False)).lower() != "utf-8":
    raise WorkflowError(f"this locale's encoding is {encoding}, and all files here are UTF-8: set PYTHONUTF8=1")

# Here and in jobs: this checkout's code, run by the Python that runs Snakemake (`--sdm conda` gives jobs another).
# A user's own PYTHONPATH comes after it.
sys.path.insert(0, os.path.join(workflow.current_basedir, "workflow"))
os.environ.update(
    PYTHONUTF8="1",
    PYTHONPATH=os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")])),
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()]),
)

from snakemake.utils import min_version

from d2o import preflight
from d2o.errors import D2OError
from d2o.layout import PLACES
from d2o.needs import Needs
from d2o.plan import Plan
from d2o.report import screen

# Older versions have bugs with path variables in modules and with storage plugins; the tests run this version.
min_version("9.27")

if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


try:
    plan = Plan(config, origin=", ".join(map(str, workflow.configfiles)))
    needs = Needs(plan)
except D2OError as error:
    raise WorkflowError(str(error)) from None


if workflow.is_main_process:
    for line in plan.warnings():
        print(line, file=sys.stderr)

# Outside the params: to share GPUs or not changes no result.
os.environ.update(D2O_SHARE_GPUS=str(int(plan.settings.compute.share_gpus)))


# The paths of artifacts: rules name them, as `<responses>`.
pathvars:
    **PLACES,
    results=plan.settings.results,


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        plan.targets("page"),
        plan.targets("released"),


include: "workflow/rules/organisms.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/datasets.smk"
include: "workflow/rules/negatives.smk"
include: "workflow/rules/positives.smk"
include: "workflow/rules/reference_logprobs.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/rounds.smk"
include: "workflow/rules/responses.smk"
include: "workflow/rules/heldout_logprobs.smk"
include: "workflow/rules/scores.smk"
include: "workflow/rules/judge.smk"
include: "workflow/rules/pair_quality.smk"
include: "workflow/rules/human_eval.smk"
include: "workflow/rules/tasks.smk"
include: "workflow/rules/weights.smk"
include: "workflow/rules/report.smk"


# Below the rules: constraints reach the wildcards of path variables only in rules that are there already.
wildcard_constraints:
    **plan.names(),
    seed=r"\d+",
    round=r"\d+",
    snapshot=r"(/step\d+)?",
    pool=r"(corrected|plain)(-seed\d+)?-k\d+",
    shard=r"\d+-of-\d+",
    table=r"negatives|pairs|(corrected|plain)(-seed\d+)?-k\d+",
    preference="chosen|rejected",


onstart:
    if workflow.is_main_process:
        lacking = preflight.problems([*workflow.dag.needrun_jobs()], plan, workflow.executor_plugin.name)
        if lacking:
            raise WorkflowError("nothing was started, for this is missing:", *lacking)


onsuccess:
    made = {str(path) for job in workflow.dag.finished_jobs for path in job.output}
    for path in plan.targets("page"):
        if path in made:
            screen.show(path)
        if os.path.exists(path):
            print(f"The report: {os.path.abspath(path)}")
