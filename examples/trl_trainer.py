"""D2O as a trainer of TRL: K positives a prompt, and each prompt computed once.

    trainer = D2OTrainer(model=model, args=DPOConfig(…), train_dataset=rows, processing_class=tokenizer)
    trainer.train()

A row is {"prompt": [messages], "chosen": [K texts], "rejected": [one or more texts]}. Schedules, logging, callbacks
and checkpoints are TRL's.
"""

import torch
from trl import DPOTrainer

from d2o import chat, losses
from d2o.forward import Policy, Row, sides
from d2o.groups import Group, Response


class D2OTrainer(DPOTrainer):
    """TRL's DPOTrainer with the response group in place of the pair.

    Args:
        loss: a loss of `d2o.losses`, given the two sides of a term.
        arguments: as of DPOTrainer; without `ref_model` the reference is the model as it was loaded.
    """

    def __init__(self, *, loss=lambda *pair: losses.d2o(*pair, beta=0.1, alpha=0.1), **arguments):
        super().__init__(**arguments, data_collator=lambda rows: {"groups": [self._group(row) for row in rows]})
        if self.accelerator.num_processes > 1:
            raise ValueError("D2OTrainer calls the model behind DistributedDataParallel's back: run one process")
        if self.ref_model is None:
            raise ValueError("D2OTrainer needs a reference model: leave out peft_config and precompute_ref_log_probs")
        self.loss, self.policy, self.reference = loss, Policy(self.model), Policy(self.ref_model)

    def _prepare_dataset(self, dataset, tokenizer, args, name):
        end = chat.end_of_turn(tokenizer)

        def tokenize(row):
            answers = [(text, True) for text in row["chosen"] + row["rejected"]]
            ((prompt, ids),) = chat.encode(tokenizer, [(row["prompt"], answers)], end)
            k = len(row["chosen"])
            return {"prompt_ids": prompt, "chosen_ids": ids[:k], "rejected_ids": ids[k:]}

        return dataset.map(tokenize, remove_columns=dataset.column_names, desc=f"Tokenizing {name} dataset")

    def _group(self, row):
        def branches(side):
            return [Response(f"{side}{n}", ids[: self.args.max_length]) for n, ids in enumerate(row[f"{side}_ids"])]

        return Group("", row["prompt_ids"], branches("chosen"), branches("rejected"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        groups = inputs["groups"]
        responses = [response for group in groups for response in group.responses]
        device = self.accelerator.device
        for response, logprob in zip(responses, self.reference.sums(Row.of(groups).to(device)).tolist(), strict=True):
            response.reference_logprob = logprob
        terms = sides(self.policy, groups, device)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for side, those in zip(("chosen", "rejected"), zip(*terms, strict=True), strict=True):
            metrics[f"logratios/{side}"].append(torch.cat([one.logratios.detach() for one in those]).mean().item())
        loss = torch.stack([self.loss(*pair) for pair in terms]).mean()
        return (loss, None) if return_outputs else loss
