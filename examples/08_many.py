"""Serves conversations with a shared system prompt: continuous batching and a prefix cache."""

import mlx.core as mx

from examples import smollm2
from mlx_kvcache.plugin import Many, make_prompt_cache
from mlx_kvcache.sessions import Session, SessionPool

model, tokenizer = smollm2.load()
sessions = SessionPool(lambda: make_prompt_cache(model), max_bytes=512_000_000)
many = Many(model, tokens_per_step=64)
system = {"role": "system", "content": "You are a guide who answers in one short sentence."}

# The shared beginning is computed once; a pinned cache is never evicted.
with sessions.open(tokenizer.apply_chat_template([system])) as shared:
    model(mx.array([shared.rest]), cache=shared.cache)
    shared.close(is_pinned=True)

countries = ("Peru", "Japan", "Egypt", "Greece")
questions = [f"What is the capital of {country}?" for country in countries]
running: dict[int, tuple[str, Session]] = {}
replies: dict[int, list[int]] = {}
step = 0
while questions or running:
    if questions and step % 4 == 0:
        question = questions.pop(0)
        turn = [system, {"role": "user", "content": question}]
        session = sessions.open(tokenizer.apply_chat_template(turn, add_generation_prompt=True))
        ticket = many.add(
            session.rest, max_tokens=16, cache=session.cache, stop_tokens=tokenizer.eos_token_ids
        )
        running[ticket], replies[ticket] = (question, session), []
        print(f"{question!r} joins: {session.reused} tokens reused, {len(session.rest)} to compute")
    for generated in many.step():
        question, session = running[generated.ticket]
        if generated.token is not None and generated.finish != "stop":
            replies[generated.ticket].append(generated.token)
        if generated.finish:
            del running[generated.ticket]
            session.extend(replies[generated.ticket][: session.cache.position - len(session.tokens)])
            session.close()
            print(f"{question!r}: {tokenizer.decode(replies[generated.ticket])!r}")
    step += 1
print(f"{sessions.counts.reused} tokens did not have to be computed; {len(sessions)} conversations are kept")
