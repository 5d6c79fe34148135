"""Chat templates: what Hugging Face's environment gives them, and what the sandbox keeps from them."""

from __future__ import annotations

import time

import pytest

from wisp.api import sandbox
from wisp.api.template import ChatTemplate, chat_template
from wisp.core.errors import RequestError

USER = [{"role": "user", "content": "Hi <b> é"}]


def test_blocks_are_trimmed_and_loops_controlled() -> None:
    source = """
    {%- for m in messages %}
        {%- if m.content == 'skip' %}{% continue %}{% endif %}
{{ bos_token + m.content + eos_token }}
    {%- endfor %}
{% generation %}x{% endgeneration %}"""
    messages = [{"role": "user", "content": c} for c in ("a", "skip", "b")]
    assert ChatTemplate(source).render(messages, bos_token="<", eos_token=">") == "<a><b>x"


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    assert (
        ChatTemplate("{{ messages[0] | tojson }}").render(USER) == '{"role": "user", "content": "Hi <b> é"}'
    )
    assert ChatTemplate("{{ [1] | tojson(indent=2) }}").render(USER) == "[\n  1\n]"


def test_dates() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


def test_without_a_template_it_is_chatml() -> None:
    expected = "<|im_start|>user\nHi <b> é<|im_end|>\n<|im_start|>assistant\n"
    assert chat_template(None).render(USER) == expected


def test_a_template_is_compiled_once() -> None:
    assert chat_template("{{ messages }}") is chat_template("{{ messages }}")


def test_a_template_that_knows_developers_sees_them() -> None:
    source = "{% if messages[0].role == 'developer' %}dev{% endif %}"
    assert ChatTemplate(source).render([{"role": "developer", "content": ""}]) == "dev"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ x.y }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9**9**9 }}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_the_sandbox_refuses_is_a_bad_request(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(USER)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_rendering_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(RequestError, match="longer than"):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}").render(
            USER
        )


def test_a_prompt_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CHARS", 1000)
    with pytest.raises(RequestError, match="longer than 1000 characters"):
        ChatTemplate("{% for i in range(2000) %}x{% endfor %}").render(USER)


def test_a_template_that_does_not_compile_is_the_servers_fault() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{% if %}")
    assert caught.value.status == 500
