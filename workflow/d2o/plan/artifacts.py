"""What a plan knows of each artifact besides its path: who needs it, how one asks for it, which settings make it.

`layout.PLACES` gives the paths. A place without an entry is a folder, or a file that comes with another artifact.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One kind of artifact.

    Attributes:
        stage: the stage whose settings make it, a case of `stages.of`. Without one, a change of settings is told of
            what it is made from, or it is made again at no cost.
        section: the section of the config that is named where those settings have changed, or an entry of it.
        only_with: the key of an experiment that asks for it. Without one, every experiment with the names in its path
            needs it.
        ask: how a config asks for it: for the message where it is a target that no experiment needs.
        reported: whether a report is made from it.
        of_initial: whether the initial model has it as well.
        of_weights: whether a training's weights are loaded for it.
    """

    stage: str = ""
    section: str = ""
    only_with: str = ""
    ask: str = ""
    reported: bool = False
    of_initial: bool = False
    of_weights: bool = False


ARTIFACTS = {
    # By name.
    "model": Artifact(stage="models", section="models"),
    "organism": Artifact(stage="organisms", section="organisms", ask="name a data set with `organism`"),
    "questions": Artifact(stage="questions", section="tasks"),
    "fetched_reward": Artifact(stage="rewards", section="rewards"),
    # By data set.
    "rows": Artifact(stage="datasets", section="datasets"),
    "negatives": Artifact(stage="negatives", section="datasets", reported=True),
    "leaks": Artifact(reported=True),
    "trained_reward": Artifact(stage="rewards", section="rewards"),
    # By data set and initial model.
    "pool": Artifact(stage="positives", section="positives", ask="name a method with `positives: self`"),
    "pool_sheet": Artifact(reported=True),
    "pool_scores": Artifact(stage="scores", section="rewards", reported=True),
    "reference_logprobs": Artifact(
        stage="logprobs", section="forward", ask="name a method whose loss has a reference, such as d2o,"
    ),
    "tuned": Artifact(reported=True),
    # By run.
    "trained": Artifact(stage="train", section="methods", ask="name a method besides `initial`", reported=True),
    "train_log": Artifact(reported=True),
    "responses": Artifact(
        stage="responses", section="responses", reported=True, of_initial=True, of_weights=True
    ),
    "heldout_logprobs": Artifact(
        stage="logprobs", section="forward", reported=True, of_initial=True, of_weights=True
    ),
    "scores": Artifact(stage="scores", section="rewards", ask="set `rewards`", reported=True, of_initial=True),
    "verdicts": Artifact(stage="judge", section="judges", ask="set `judges`", reported=True),
    "task_values": Artifact(
        stage="tasks", section="tasks", ask="set `tasks`", reported=True, of_initial=True, of_weights=True
    ),
    "round_sheet": Artifact(reported=True),
    "released": Artifact(ask="set `keep: nothing`"),
    "card": Artifact(ask="name a method besides `initial`"),
    # Figure 1: the human pairs themselves, scored and judged.
    "pair_prompts": Artifact(stage="pair_quality", section="pair_quality", only_with="pair_quality"),
    "pair_scores": Artifact(stage="scores", section="rewards", only_with="pair_quality"),
    "pair_verdicts": Artifact(stage="judge", section="judges", only_with="pair_quality"),
    "pair_quality_figure": Artifact(only_with="pair_quality", ask="set `pair_quality: true`", reported=True),
    # By experiment.
    "human_key": Artifact(stage="human_eval", section="experiments", only_with="human_eval"),
    "human_pages": Artifact(only_with="human_eval", ask="set `human_eval`"),
    "human_verdicts": Artifact(
        stage="human_verdicts", section="experiments", only_with="human_eval", reported=True
    ),
}  # fmt: skip


def of(place: str) -> Artifact:
    """What is known of a place of `layout.PLACES`: of one without an entry, nothing."""
    return ARTIFACTS.get(place, Artifact())
