"""Runs an agent whose prompt changes before its end at every turn, and keeps what stays the same.

The header shows the time, and the thinking of earlier replies is dropped, as many chat templates do.
"""

import mlx_lm

from examples import smollm2
from mlx_kvcache.plugin import make_session_pool

TOOLS = "\n".join(
    f"- tool_{i}(path): reads a file of kind {i} and returns its first lines." for i in range(8)
)
RESULTS = ("the file has 12 lines", "the file is empty", "there is no such file", "the file has 3 lines")

model, tokenizer = smollm2.load()
pool = make_session_pool(model, max_stored=8)
history: list[dict[str, str]] = []

for turn, result in enumerate(RESULTS):
    header = f"It is {9 + turn} o'clock; {turn} results so far."
    history.append({"role": "user", "content": f"The tool says: {result}. What is next?"})
    system = {"role": "system", "content": f"{header}\nYou are an agent with these tools:\n{TOOLS}"}
    prompt = tokenizer.apply_chat_template([system, *history], add_generation_prompt=True)

    with pool.open(prompt, splice=32) as session:
        parts = list(
            mlx_lm.stream_generate(model, tokenizer, session.rest, max_tokens=16, prompt_cache=session.cache)
        )
        session.extend([part.token for part in parts])
        print(
            f"turn {turn + 1}: {session.reused} of {len(prompt)} tokens reused, {len(session.rest)} computed"
        )

    # SmolLM2 does not think: all before its last sentence stands for that, and is not shown to it again.
    thought, _, answer = "".join(part.text for part in parts).rpartition(".")
    history.append({"role": "assistant", "content": answer.strip() or thought})
