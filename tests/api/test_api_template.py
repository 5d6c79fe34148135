"""Chat templates: what Hugging Face's environment gives them, and what the sandbox keeps from them."""

from __future__ import annotations

import resource
import time

import jinja2.sandbox
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
def test_a_refusal_of_the_sandbox_is_a_bad_request(source: str) -> None:
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


LOOPED = "{% set ns = namespace(x='ab', n=3, l=[], d=1) %}{% for i in range(60) %}%s{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOPED.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
        LOOPED.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
        LOOPED.replace("%s", "{% set ns.x = ns.x * 9 %}"),
        LOOPED.replace("%s", "{% set ns.n = ns.n * ns.n %}"),
        LOOPED.replace("%s", "{% set ns.l = [ns.l, ns.l] %}"),
        LOOPED.replace("%s", "{% set ns.l = (ns.l, 1, ns.l) %}"),
        LOOPED.replace("%s", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}"),
        LOOPED.replace("%s", "{% set ns.l = dict(a=ns.l, b=ns.l) %}"),
        LOOPED.replace("%s", "{% set ns.d = namespace(a=ns.d, b=ns.d) %}"),
        LOOPED.replace("%s", "{% set ns.l = [ns.l] | batch(1) | list + ns.l + ns.l + [1] %}"),
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ '\t'.expandtabs(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a' | indent(10**9, first=true) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ ('a' * 9999).replace('a', 'a' * 9999) }}",
        "{{ ('a' * 9999) | replace('a', 'a' * 9999) }}",
        "{{ ('a' * 9999).join(range(9999) | map('string')) }}",
        "{{ range(9999) | join('a' * 9999) }}",
        "{{ ('a' * 9999).translate({97: 'a' * 9999}) }}",
        "{{ 1.5 | round(10**7, 'ceil') }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{{ messages | pprint }}",
        "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(1) }}",
    ],
)
def test_a_template_that_would_take_all_memory_is_a_bad_request(source: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(USER)
    assert caught.value.status in (400, 500)  # 500: it does not compile
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 << 10


def test_a_loop_that_calls_nothing_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    loops = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="longer than"):
        ChatTemplate("{% set r = range(90000) %}" + loops).render(USER)


def test_output_of_a_macro_in_a_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_MADE", 1 << 20)
    source = "{% macro m() %}{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}{% endmacro %}{{ m() }}"
    with pytest.raises(RequestError, match="more text than it may"):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize("source", ["{% break %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"])
def test_a_template_that_python_cannot_compile_is_a_server_error(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source)
    assert caught.value.status == 500


def test_a_templates_complaint_is_shortened_to_one_line() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception('a\n\x1b' ~ 'x' * 5000) }}").render(USER)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


EVERYDAY = """
{%- macro shown(call, n=1) %}<{{ call.name }}:{{ n }}>{% endmacro -%}
{%- set ns = namespace(system='', seen=[]) %}
{%- for m in messages %}
  {%- if m.role == 'system' %}{% set ns.system = ns.system ~ m.content + '\n' %}{% continue %}{% endif %}
  {%- set ns.seen = ns.seen + [m.role, [loop.index, (1, m.content)]] %}
{{ '%s|%03d' % (m.role, loop.index) }} {{ m.content | trim | replace('a', 'bb') }}
{{ m['content'].split(' ')[0].ljust(4) }}.
{%- endfor %}
{{ ns.system | upper }}{{ ns.seen | length }}{{ ns.seen }}{{ shown({'name': 'f'}, n=2) }}
{{ messages | map(attribute='role') | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ {'b': 2, 'a': [1, none]} | tojson(indent=2) }} {{ [3, 1, 2] | sort | join }}
{{ [1, 2, 3] | sum }} {{ 2 ** 8 }} {{ 7 % 4 }}
{{ '{} {x}'.format(1, x=2) }} {{ '%s' | format('q') }} {{ 3.14159 | round(2) }}
{{ 'abcdef' | truncate(4) }} {{ undefined | default('d') }}
{{ [1, 2, 3, 4] | batch(3, 0) | list }} {{ [1, 2, 3] | slice(2) | list }}
{{ 'x\ny' | indent(2) }} {{ 'a' | center(5) }}|
"""


def test_everyday_templates_say_what_they_say_in_jinja2s_own_sandbox() -> None:
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": " hi a b "},
        {"role": "assistant", "content": "é"},
    ]
    stock = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    stock.filters["tojson"] = sandbox._to_json
    assert ChatTemplate(EVERYDAY).render(messages) == stock.from_string(EVERYDAY).render(messages=messages)
