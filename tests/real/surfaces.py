"""The four surfaces of vLLM through the official SDKs, streaming and not, and what each says about usage."""

import dataclasses
import threading
import time

import anthropic
import openai

from processes import MODEL

REQUEST_ID = "x-farthing-request-id"
QUESTIONS = [
    "Who used the pool?",
    "hello there, how are you",
    # Long enough for vLLM's prefix cache, and sent more than once.
    " ".join(f"entry {number} of the ledger says that somebody owes something;" for number in range(60)),
]


@dataclasses.dataclass
class Seen:
    """What the client of one request saw."""

    case: str
    request_id: str | None = None
    ended: bool = False
    text: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    problem: str | None = None


class Clients:
    """Both SDKs, pointed at one server. Without retries: each call is one request."""

    def __init__(self, url, key, timeout_s=120):
        self.openai = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=timeout_s)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=timeout_s)


def chat(clients, question, tokens, stream, usage=None):
    options = {"stream_options": {"include_usage": usage}} if usage is not None else {}
    return clients.openai.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=tokens, stream=stream,
        extra_body={"ignore_eos": True}, **options)


def completions(clients, question, tokens, stream, usage=None):
    options = {"stream_options": {"include_usage": usage}} if usage is not None else {}
    return clients.openai.completions.with_raw_response.create(
        model=MODEL, prompt=question, max_tokens=tokens, stream=stream, extra_body={"ignore_eos": True}, **options)


# These two surfaces cannot be told to ignore the end of a text; with temperature 0 the model's random weights never come to one here.
def responses(clients, question, tokens, stream):
    return clients.openai.responses.with_raw_response.create(
        model=MODEL, input=question, max_output_tokens=tokens, stream=stream, store=False, temperature=0)


def messages(clients, question, tokens, stream):
    return clients.anthropic.messages.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=tokens, stream=stream,
        extra_body={"temperature": 0})


# name, call, streaming, whether the client asked for usage in the stream (None: the surface does not let it choose)
CASES = [
    ("chat", chat, False, None),
    ("chat stream", chat, True, None),
    ("chat stream, usage asked", chat, True, True),
    ("chat stream, usage declined", chat, True, False),
    ("completions", completions, False, None),
    ("completions stream", completions, True, None),
    ("completions stream, usage asked", completions, True, True),
    ("responses", responses, False, None),
    ("responses stream", responses, True, None),
    ("messages", messages, False, None),
    ("messages stream", messages, True, None),
]


def openai_usage(seen, usage):
    if usage is not None:
        seen.input_tokens, seen.output_tokens = usage.prompt_tokens, usage.completion_tokens


def responses_usage(seen, usage):
    if usage is not None:
        seen.input_tokens, seen.output_tokens = usage.input_tokens, usage.output_tokens


def messages_usage(seen, usage):
    """Anthropic's input excludes what the cache read and wrote; a later report replaces an earlier one."""
    if usage is not None and usage.input_tokens is not None:
        cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
        seen.input_tokens, seen.output_tokens = usage.input_tokens + cached, usage.output_tokens


def ask(clients, case, question, tokens, abort_after=None):
    """One request. `abort_after` closes a stream after so many events."""
    name, call, stream, usage = case
    seen = Seen(name)
    options = {"usage": usage} if usage is not None else {}
    raw = call(clients, question, tokens, stream, **options)
    seen.request_id = raw.headers.get(REQUEST_ID)
    answer = raw.parse()
    if not stream:
        whole(seen, call, answer)
        return seen
    usage_chunks = empty_chunks = events = 0
    for event in answer:
        events += 1
        if call in (chat, completions):
            usage_chunks += getattr(event, "usage", None) is not None
            empty_chunks += not event.choices
            openai_usage(seen, getattr(event, "usage", None))
            for choice in event.choices:
                seen.text += (choice.delta.content if call is chat else choice.text) or ""
                seen.ended |= choice.finish_reason is not None
        elif call is responses:
            seen.text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "response.completed":
                seen.ended = True
                responses_usage(seen, event.response.usage)
        else:
            seen.text += event.delta.text if event.type == "content_block_delta" else ""
            if event.type == "message_start":
                messages_usage(seen, event.message.usage)
            elif event.type == "message_delta":
                messages_usage(seen, event.usage)
            seen.ended |= event.type == "message_stop"
        if abort_after and events >= abort_after:
            answer.close()
            seen.ended = False
            return seen
    if call in (chat, completions):
        wanted = 1 if usage else 0
        if usage_chunks != wanted or empty_chunks != wanted:
            seen.problem = f"{usage_chunks} chunks with usage and {empty_chunks} without choices, where {wanted} were asked for"
    if not seen.ended:
        seen.problem = "the stream ended without its last event"
    return seen


def whole(seen, call, answer):
    seen.ended = True
    if call is chat:
        seen.text = answer.choices[0].message.content or ""
        openai_usage(seen, answer.usage)
    elif call is completions:
        seen.text = answer.choices[0].text
        openai_usage(seen, answer.usage)
    elif call is responses:
        seen.text = answer.output_text
        responses_usage(seen, answer.usage)
    else:
        seen.text = "".join(block.text for block in answer.content)
        messages_usage(seen, answer.usage)
    if seen.output_tokens is None:
        seen.problem = "no usage in the answer"


def give_up(impatient, case, question, tokens):
    """A request whose client has a short time-out and loses patience before the answer is there. True when it did."""
    _, call, stream, _ = case
    try:
        call(impatient, question, tokens, stream)
    except (openai.APITimeoutError, anthropic.APITimeoutError):
        return True
    return False


def at_once(jobs, workers=16):
    """Runs all jobs, so many at a time, and returns what each returned or raised, in order."""
    results, lock, queue = [None] * len(jobs), threading.Lock(), list(enumerate(jobs))

    def work():
        while True:
            with lock:
                if not queue:
                    return
                index, job = queue.pop(0)
            try:
                results[index] = job()
            except Exception as error:  # noqa: BLE001 - whatever goes wrong is a result, and the report shows it
                results[index] = error

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.2)
    return results
