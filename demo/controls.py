"""Scorers that can tell nothing of an answer: null controls (config/controls.yaml)."""


def prompt_length(prompts: list[str], answers: list[str]) -> list[float]:
    """Length of each prompt in characters, whatever the answer says."""
    return [float(len(prompt)) for prompt in prompts]
