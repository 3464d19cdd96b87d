"""The metric of the task `plain`, as lm-evaluation-harness calls it."""

import math


def per_byte(doc, results):
    """Bits per byte of a text, from its log-likelihood in nats."""
    (loglikelihood,) = results
    return {"bits_per_byte": -loglikelihood / math.log(2) / len(doc["text"].encode())}
