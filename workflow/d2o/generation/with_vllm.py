"""Generation with vLLM, on GPUs or a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from d2o import chat, devices, dtypes, model_folders
from d2o.generation import Completion, Request
from d2o.settings import Engine, Sampling


class VLLM:
    """As `generation.Generator`; vLLM itself batches the queued requests.

    Attributes:
        llm: vLLM's own object.
    """

    def __init__(self, folder: Path, engine: Engine):
        self._queue = 4 * engine.max_num_seqs
        tokenizer = chat.load_tokenizer(folder)
        self._context, self._end = tokenizer.model_max_length, chat.end_of_turn(tokenizer)
        options = {}
        if devices.device() == "cpu":
            # A seed per request needs unchunked prefill on a CPU.
            options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self._context, 2048)}
        self.llm = LLM(
            model=str(folder),
            dtype=dtypes.checkpoint_dtype(),
            max_model_len=self._context,
            max_num_seqs=engine.max_num_seqs,
            enforce_eager=engine.eager,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            tensor_parallel_size=engine.tensor_parallel,
            enable_prefix_caching=True,
            trust_remote_code=model_folders.trusts_code(folder),
            **options,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, Completion]]:
        # `LLM.generate` returns after the last answer; its engine returns each answer as it finishes. The queue is
        # only as long as batches need it: a shard may have a million requests.
        engine, waiting = self.llm.llm_engine, enumerate(requests)
        while True:
            for place, request in islice(waiting, self._queue - engine.get_num_unfinished_requests()):
                (prompt,) = engine.renderer.render_cmpl([TokensPrompt(prompt_token_ids=list(request.ids))])
                engine.add_request(str(place), prompt, self._params(request, sampling))
            if not engine.has_unfinished_requests():
                return
            for output in engine.step():
                answer = output.outputs[0]
                completion = Completion(answer.text.strip(), len(answer.token_ids), answer.finish_reason)
                yield int(output.request_id), completion

    def _params(self, request: Request, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(sampling.max_tokens, self._context - len(request.ids)),
            seed=request.seed,
            stop_token_ids=[self._end],  # in addition to those of the checkpoint's own settings
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
