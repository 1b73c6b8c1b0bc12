"""A process that generates with vLLM, in an environment of its own; :mod:`sam.generation.vllm` starts it.

It imports nothing of sam. Messages are JSON lines on stdin, replies JSON lines on stdout; it ends when stdin does.
vLLM's API is that of 0.32.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

Message = dict[str, Any]
Reply = Callable[[Message], None]

# One process, so that the weights can be replaced and that nothing is left when it ends; nothing is reported to vLLM.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Worker:
    """A model in vLLM; each method answers the message that it is named after."""

    def __init__(self, messages: SimpleQueue[Message], reply: Reply) -> None:
        self._messages, self._reply = messages, reply
        self._llm: Any = None

    def start(self, message: Message) -> Message:
        """Load the model: ``options`` are those of vLLM's ``LLM``, ``device`` is cuda or cpu."""
        from vllm import LLM
        from vllm.platforms import current_platform

        there = current_platform.device_type
        if there != message["device"]:
            raise RuntimeError(f"this vLLM runs on {there or 'no device that is here'}, not on {message['device']}")
        self._llm = LLM(**message["options"])
        return {"started": True}

    def load(self, message: Message) -> Message:
        """Replace weights by those of the ``file`` in each of the next messages, until there is none in one.

        The weights of a decoder layer come in one file, all of them: vLLM keeps some in one tensor.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the model before cannot be emptied")
        return {"loaded": True}

    def _weights(self) -> Iterator[tuple[str, Any]]:
        from safetensors.torch import load_file

        while (file := self._messages.get()["file"]) is not None:
            yield from load_file(file).items()
            self._reply({"read": True})

    def generate(self, message: Message) -> Message:
        """Reply with index, token ids and log-probabilities of each completion as it is done, until a message comes."""
        engine = self._llm.llm_engine
        prompts = [{"prompt_token_ids": ids} for ids in message["prompts"]]
        sampling = [self._sampling(message, grammar) for grammar in message["grammars"]]
        # An id is that of the outputs, then random letters.
        ids = [one.partition("-")[0] for one in self._llm.enqueue(prompts, sampling, use_tqdm=False)]
        places = {one: n for n, one in enumerate(ids)}
        while engine.has_unfinished_requests():
            if not self._messages.empty():
                self._messages.get()
                engine.abort_request(list(places))
                break
            for output in engine.step():
                if output.finished:
                    (made,) = output.outputs
                    ids = list(made.token_ids)
                    logprobs = [of[token].logprob for of, token in zip(made.logprobs, ids, strict=True)]
                    self._reply({"index": places.pop(output.request_id), "ids": ids, "logprobs": logprobs})
        return {"done": True}

    def _sampling(self, message: Message, grammar: str | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        return SamplingParams(
            temperature=0,
            max_tokens=message["max_tokens"],
            stop_token_ids=message["stop"],
            ignore_eos=True,  # the stop tokens are all that ends
            logprobs=0,  # of the generated tokens alone
            detokenize=False,
            structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar),
        )


def main() -> None:
    """Answer messages until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM prints

    def reply(message: Message) -> None:
        print(json.dumps(message), file=out, flush=True)

    messages: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    worker = Worker(messages, reply)
    while True:
        message = messages.get()
        try:
            if message["do"] != "stop":  # what it was to stop had just ended
                reply(getattr(worker, message["do"])(message))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})


def _read(messages: SimpleQueue[Message]) -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))
    os._exit(0)  # whatever is being computed: nobody waits for it


if __name__ == "__main__":
    here = Path(__file__).resolve().parent  # its vllm.py and transformers.py would hide the packages
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    os.environ.update(SETTINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
