"""Chat templates for tests, in the styles of published models, with ChatML's markers."""

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must take turns: user, assistant, user, …') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- macro header(role) %}
{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- header('system') + 'Today: ' + date_string + '<|eot_id|>' }}
    {%- endif %}
    {{- header(message.role) + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{%- endif %}
"""
MISTRAL = """\
{%- set ns = namespace(index=0, shown=[]) %}
{%- set talk = messages | rejectattr('role', 'equalto', 'system') | list %}
{{- bos_token }}
{%- for m in talk %}
{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if m['role'] == 'user' %}{{- '[INST]' ~ m['content'] ~ '[/INST]' }}
{%- elif m['role'] in ['assistant'] %}
{%- generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}
{%- else %}{% continue %}{% endif %}
{%- set ns.index = ns.index + 1 %}{% set ns.shown = ns.shown + [m.role | upper] %}
{%- if ns.index > 100 %}{% break %}{% endif %}
{%- endfor %}{{ ns.shown | join(',') ~ (messages | tojson) }}"""
# DeepSeek R1: reasoning is removed from earlier answers.
THINKING = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{%- set ns = namespace(system='', first=true) %}{%- for m in messages %}\
{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{%- endfor %}\
{{ bos_token }}{{ ns.system }}\
{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] }}\
{%- elif m['role'] == 'assistant' and m['content'] is not none %}\
{% set content = m['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<repo_name>' + content + eos_token }}{%- endif %}{%- endfor %}\
{% if add_generation_prompt %}{{ '<repo_name><think>\\n' }}{% endif %}"""
# Qwen 3: reasoning after the last question is kept, formatted by the template.
REASONING = """\
{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for message in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}
{%- if ns.open and message.role == 'user' and message.content is string
       and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
{%- set ns.open = false %}{% set ns.last = index %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.content is string %}{% set content = message.content %}
{%- else %}{% set content = '' %}{% endif %}
{%- if message.role in ('user', 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- elif message.role == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if loop.index0 > ns.last or not loop.last %}
{{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') }}
{{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{% endif %}{{- '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# Gemma: other role names; the system message is put before the user's message.
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{% set first = messages[0]['content'] + '\\n\\n' %}{% set talk = messages[1:] %}\
{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}\
{% for message in talk %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<|im_start|>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim }}\
{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
# Phi: markers are concatenated from strings and the role name.
PIECES = """\
{% for m in messages %}{{ '<|im_' ~ ('start' if true) ~ '|>' ~ m.role | title }}\
{{ ['\\n', m.content, '<|im_end|>'] | join }}{% filter trim %} {{ m.role[::-1] }} {% endfilter %}\
{% endfor %}{{ '<|im_%start|>'.replace('%', '') if add_generation_prompt }}"""
TOOLS = """\
{%- if tools is none %}{% set tools = [] %}{% endif %}
{%- set ns = namespace(parts=[]) %}
{%- for m in messages %}{% set ns.parts = ns.parts + [{'role': m.role, 'content': m.content}] %}
{%- endfor %}
{%- macro wrapped(m) %}<|im_start|>{{ caller(m.role) }}
{{ m.content | replace('\\t', '    ') | indent(2) }}<|im_end|>{% endmacro %}
{%- for m in messages %}{% call(kind) wrapped(m) %}{{ kind | capitalize }}{% endcall %}{% endfor %}
{{- ns.parts | tojson }}{{ tools | tojson(indent=2) }}{{ ns.parts | map(attribute='role') | list }}
{%- for line in (messages | last).content.splitlines() %}{{ loop.index }}: {{ line|e }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>{% endif %}"""
STYLES = {
    "ChatML": CHATML,
    "Llama 2": LLAMA2,
    "Llama 3": LLAMA3,
    "Mistral": MISTRAL,
    "thinking": THINKING,
    "reasoning": REASONING,
    "Gemma": GEMMA,
    "pieces": PIECES,
    "tools": TOOLS,
}
