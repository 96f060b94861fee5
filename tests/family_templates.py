"""Chat templates in the styles of published model families, written by hand for the tests.

Each has the structure and the constructs of its family (namespaces, macros, reversed loops, tools,
calls, reasoning, dates, refusals), with sentences and names of its own.
"""
# ruff: noqa: E501 (lines of templates)

QWEN2 = """\
{% for turn in messages %}{% if loop.first and turn['role'] != 'system' %}\
{{ '<|im_start|>system\\nAnswer well.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen 2.5: schemas in the system message, results of tools together in one turn of the user.
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'Answer well.' }}
    {%- endif %}
    {{- "\\n\\nFunctions that exist:\\n<tools>" }}
    {%- for each in tools %}
        {{- "\\n" }}
        {{- each | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\nCall one as <tool_call>\\n{\\"name\\": …}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nAnswer well.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for turn in messages %}
    {%- if (turn.role == "user") or (turn.role == "system" and not loop.first) or (turn.role == "assistant" and not turn.tool_calls) %}
        {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>' + '\\n' }}
    {%- elif turn.role == "assistant" %}
        {{- '<|im_start|>' + turn.role }}
        {%- if turn.content %}
            {{- '\\n' + turn.content }}
        {%- endif %}
        {%- for call in turn.tool_calls %}
            {%- if call.function is defined %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- call.name }}
            {{- '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif turn.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- turn.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Qwen 3: reasoning since the last question stays, and enable_thinking closes it in advance.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "Functions that exist:\\n<tools>" }}
    {%- for each in tools %}
        {{- "\\n" }}
        {{- each | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set state = namespace(searching=true, question=messages|length - 1) %}
{%- for turn in messages[::-1] %}
    {%- set place = (messages|length - 1) - loop.index0 %}
    {%- if state.searching and turn.role == "user" and turn.content is string and not(turn.content.startswith('<tool_response>') and turn.content.endswith('</tool_response>')) %}
        {%- set state.searching = false %}
        {%- set state.question = place %}
    {%- endif %}
{%- endfor %}
{%- for turn in messages %}
    {%- if turn.content is string %}
        {%- set text = turn.content %}
    {%- else %}
        {%- set text = '' %}
    {%- endif %}
    {%- if (turn.role == "user") or (turn.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + turn.role + '\\n' + text + '<|im_end|>' + '\\n' }}
    {%- elif turn.role == "assistant" %}
        {%- set thought = '' %}
        {%- if turn.reasoning_content is string %}
            {%- set thought = turn.reasoning_content %}
        {%- else %}
            {%- if '</think>' in text %}
                {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > state.question %}
            {%- if loop.last or (not loop.last and thought) %}
                {{- '<|im_start|>' + turn.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + turn.role + '\\n' + text }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + turn.role + '\\n' + text }}
        {%- endif %}
        {%- if turn.tool_calls %}
            {%- for call in turn.tool_calls %}
                {%- if (loop.first and text) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if call.function %}
                    {%- set call = call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- call.name }}
                {{- '", "arguments": ' }}
                {%- if call.arguments is string %}
                    {{- call.arguments }}
                {%- else %}
                    {{- call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif turn.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- text }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# DeepSeek-R1's distills of Qwen and Llama: one line, marks of roles that are not special tokens,
# reasoning of earlier answers cut off, and the reasoning opened for the next one.
R1 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set state = namespace(begun=false, in_tools=false, in_results=false, system='') %}\
{%- for turn in messages %}{%- if turn['role'] == 'system' %}\
{% set state.system = turn['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{state.system}}\
{%- for turn in messages %}\
{%- if turn['role'] == 'user' %}{%- set state.in_tools = false -%}\
{{'<｜User｜>' + turn['content']}}{%- endif %}\
{%- if turn['role'] == 'assistant' and 'tool_calls' in turn %}{%- set state.in_tools = true -%}\
{%- for call in turn['tool_calls']%}{%- if not state.begun %}\
{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + \
call['function']['name'] + '\\n' + '```json' + '\\n' + call['function']['arguments'] + \
'\\n' + '```' + '<｜tool▁call▁end｜>'}}{%- set state.begun = true -%}{%- else %}\
{{'\\n' + '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁call▁end｜>'}}\
{{'<｜tool▁calls▁end｜>' + eos_token}}{%- endif %}{%- endfor %}{%- endif %}\
{%- if turn['role'] == 'assistant' and turn['content'] is not none and 'tool_calls' not in turn %}\
{%- if state.in_results %}{{'<｜tool▁outputs▁end｜>' + turn['content'] + eos_token}}\
{%- set state.in_results = false -%}\
{%- else %}{% set text = turn['content'] %}{% if '</think>' in text %}\
{% set text = text.split('</think>')[-1] %}{% endif %}\
{{'<｜Assistant｜>' + text + eos_token}}{%- endif %}{%- endif %}\
{%- if turn['role'] == 'tool' %}{%- set state.in_tools = true -%}{%- if not state.in_results %}\
{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + turn['content'] + '<｜tool▁output▁end｜>'}}\
{%- set state.in_results = true %}{%- else %}\
{{'\\n<｜tool▁output▁begin｜>' + turn['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}\
{%- endfor -%}{% if state.in_results %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}\
{% if add_generation_prompt and not state.in_tools %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

# Gemma 1 and 2: no system message, roles in turns, the assistant is called model.
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('A system message is not possible') }}{% endif %}\
{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Users and assistants must take turns') }}{% endif %}\
{% if (turn['role'] == 'assistant') %}{% set who = 'model' %}\
{% else %}{% set who = turn['role'] %}{% endif %}\
{{ '<start_of_turn>' + who + '\\n' + turn['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

# Gemma 3: the system message goes before the first question; content may be a list.
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set before = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set talk = messages[1:] -%}
{%- else -%}
    {%- set before = "" -%}
    {%- set talk = messages -%}
{%- endif -%}
{%- for turn in talk -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Users and assistants must take turns") }}
    {%- endif -%}
    {%- if (turn['role'] == 'assistant') -%}
        {%- set who = "model" -%}
    {%- else -%}
        {%- set who = turn['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + who + '\\n' + (before if loop.first else "") }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif part['type'] == 'text' -%}
                {{ part['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Content of another kind") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

# Mistral 7B 0.3 and Nemo: tools before the last question, ids of calls with nine characters.
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set first = messages[0]["content"] %}
    {%- set talk = messages[1:] %}
{%- else %}
    {%- set talk = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set asked = talk | selectattr("role", "equalto", "user") | list %}
{%- set state = namespace() %}
{%- set state.at = 0 %}
{%- for turn in talk %}
    {%- if not (turn.role == "tool" or turn.role == "tool_results" or (turn.tool_calls is defined and turn.tool_calls is not none)) %}
        {%- if (turn["role"] == "user") != (state.at % 2 == 0) %}
            {{- raise_exception("Questions and answers must take turns") }}
        {%- endif %}
        {%- set state.at = state.at + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for turn in talk %}
    {%- if turn["role"] == "user" %}
        {%- if tools is not none and (turn == asked[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and first is defined %}
            {{- "[INST]" + first + "\\n\\n" + turn["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + turn["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif (turn.tool_calls is defined and turn.tool_calls is not none) %}
        {{- "[TOOL_CALLS][" }}
        {%- for call in turn.tool_calls %}
            {%- set text = call.function|tojson %}
            {{- text[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception("The id of a call needs nine characters") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif turn["role"] == "assistant" %}
        {{- turn["content"] + eos_token}}
    {%- elif turn["role"] == "tool_results" or turn["role"] == "tool" %}
        {%- if turn.content is defined and turn.content.content is defined %}
            {%- set text = turn.content.content %}
        {%- else %}
            {%- set text = turn.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + text|string + ", " }}
        {%- if not turn.tool_call_id is defined or turn.tool_call_id|length != 9 %}
            {{- raise_exception("The id of a call needs nine characters") }}
        {%- endif %}
        {{- '"call_id": "' + turn.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Unknown role") }}
    {%- endif %}
{%- endfor %}
"""

# Ministral and Small: a system message with the date, content as a list, reasoning in brackets.
MINISTRAL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{%- set standard = "Today is " + today + ".\\n\\nSay so if you do not know." %}
{{- bos_token }}
{%- macro written(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('Only text is possible') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + written(messages[0]['content']) + '[/SYSTEM_PROMPT]' }}
    {%- set talk = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]' + standard + '[/SYSTEM_PROMPT]' }}
    {%- set talk = messages %}
{%- endif %}
{%- if tools is defined and tools is not none and tools|length > 0 %}
    {{- '[AVAILABLE_TOOLS]' + (tools|tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for turn in talk %}
    {%- if turn['role'] == 'user' %}
        {{- '[INST]' + written(turn['content']) + '[/INST]' }}
    {%- elif turn['role'] == 'assistant' %}
        {%- if turn.get('reasoning_content') %}
            {{- '[THINK]' + turn['reasoning_content'] + '[/THINK]' }}
        {%- endif %}
        {%- if turn['content'] is defined and turn['content']|length > 0 %}
            {{- written(turn['content']) }}
        {%- endif %}
        {%- for call in turn['tool_calls'] or [] %}
            {%- set arguments = call['function']['arguments'] %}
            {%- if arguments is not string %}
                {%- set arguments = arguments|tojson|safe %}
            {%- elif arguments == '' %}
                {%- set arguments = '{}' %}
            {%- endif %}
            {{- '[TOOL_CALLS]' + call['function']['name'] + '[ARGS]' + arguments }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif turn['role'] == 'tool' %}
        {{- '[TOOL_RESULTS]' + written(turn['content']) + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Unknown role') }}
    {%- endif %}
{%- endfor %}
"""

# SmolLM3: a mode that the system message may switch, schemas in XML, marks for training.
SMOLLM3 = """\
{#- defaults #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- if enable_thinking -%}
  {%- set mode = "/think" -%}
{%- else -%}
  {%- set mode = "/no_think" -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set first = messages[0].content -%}
  {%- if "/no_think" in first -%}
    {%- set mode = "/no_think" -%}
  {%- elif "/think" in first -%}
    {%- set mode = "/think" -%}
  {%- endif -%}
  {%- set instructions = first.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- if "/system_override" in (first or "") -%}
  {{- instructions.replace("/system_override", "").rstrip() -}}
  {{- "<|im_end|>\\n" -}}
{%- else -%}
  {{- "## Facts\\n\\n" -}}
  {{- "Date: " ~ strftime_now("%d %B %Y") ~ "\\nMode: " + mode + "\\n\\n" -}}
  {{- "## Instructions\\n\\n" -}}
  {%- if instructions -%}
    {{- instructions + "\\n\\n" -}}
  {%- elif mode == "/think" -%}
    {{- "Think between <think> and </think>, then answer.\\n\\n" -}}
  {%- else -%}
    {{- "Answer at once.\\n\\n" -}}
  {%- endif -%}
  {%- if xml_tools or python_tools or tools -%}
    {{- "### Tools\\n\\n" -}}
    {%- if xml_tools or tools -%}
      {%- if tools -%}
        {%- set xml_tools = tools -%}
      {%- endif -%}
      {%- set state = namespace(text="Signatures:\\n<tools>\\n") -%}
      {%- for tool in xml_tools[:] -%}
        {%- set state.text = state.text ~ (tool | string) ~ "\\n" -%}
      {%- endfor -%}
      {{- state.text + "</tools>\\n" -}}
    {%- endif -%}
  {%- endif -%}
  {{- "<|im_end|>\\n" -}}
{%- endif -%}
{%- for turn in messages -%}
  {%- set text = turn.content if turn.content is string else "" -%}
  {%- if turn.role == "user" -%}
    {{ "<|im_start|>" + turn.role + "\\n" + text + "<|im_end|>\\n" }}
  {%- elif turn.role == "assistant" -%}
    {% generation %}
    {%- if mode == "/think" -%}
      {{ "<|im_start|>assistant\\n" + text.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- else -%}
      {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + text.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- endif -%}
    {% endgeneration %}
  {%- elif turn.role == "tool" -%}
    {{ "<|im_start|>" + "user\\n" + text + "<|im_end|>\\n" }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if mode == "/think" -%}
    {{ "<|im_start|>assistant\\n" }}
  {%- else -%}
    {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" }}
  {%- endif -%}
{%- endif -%}
"""

PHI3 = """\
{% for turn in messages %}{% if turn['role'] == 'system' %}\
{{'<|system|>\\n' + turn['content'] + '<|end|>\\n'}}{% elif turn['role'] == 'user' %}\
{{'<|user|>\\n' + turn['content'] + '<|end|>\\n'}}{% elif turn['role'] == 'assistant' %}\
{{'<|assistant|>\\n' + turn['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Phi-3.5: marks of roles only where they are not empty.
PHI35 = """\
{% for turn in messages %}{% if turn['role'] == 'system' and turn['content'] %}\
{{'<|system|>\\n' + turn['content'] + '<|end|>\\n'}}{% elif turn['role'] in ['user', 'assistant'] %}\
{{'<|' ~ turn['role'] ~ '|>\\n' ~ turn['content'] ~ '<|end|>\\n'}}{% endif %}{% endfor %}\
{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

# Phi-4-mini: marks joined from the role; tools as a field of the system message.
PHI4 = """\
{% for turn in messages %}{% if turn['role'] == 'system' and 'tools' in turn and \
turn['tools'] is not none %}{{ '<|' + turn['role'] + '|>' + turn['content'] + '<|tool|>' + \
turn['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}\
{{ '<|' + turn['role'] + '|>' + turn['content'] + '<|end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

OLMO2 = """\
{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'system' %}\
{{ '<|system|>\\n' + turn['content'] + '\\n' }}{% elif turn['role'] == 'user' %}\
{{ '<|user|>\\n' + turn['content'] + '\\n' }}{% elif turn['role'] == 'assistant' %}\
{% if not loop.last %}{{ '<|assistant|>\\n' + turn['content'] + eos_token + '\\n' }}\
{% else %}{{ '<|assistant|>\\n' + turn['content'] + eos_token }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

# Granite 3: tools, documents and controls; `thinking` asks for reasoning between sentences.
GRANITE3 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] %}
    {%- set talk = messages[1:] %}
{%- else %}
    {%- set first = "Facts end in spring.\\nToday: " + strftime_now('%B %d, %Y') + ".\\nBe kind." %}
    {%- if tools and documents %}
        {%- set first = first + "\\nUse the tools and the documents." %}
    {%- elif tools %}
        {%- set first = first + "\\nUse the tools." %}
    {%- elif documents %}
        {%- set first = first + "\\nUse the documents only." %}
    {%- elif thinking %}
        {%- set first = first + "\\nWrite thoughts after 'Here is my thought process:' and the answer after 'Here is my response:' every time." %}
    {%- endif %}
    {%- if 'citations' in controls and documents %}
        {%- set first = first + "\\nName your sources." %}
    {%- endif %}
    {%- set talk = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + first + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' }}
    {{- tools | tojson(indent=4) }}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- if documents %}
    {{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index0 | string + '\\n' }}
        {{- document['text'] }}
        {%- if not loop.last %}
            {{- '\\n\\n'}}
        {%- endif%}
    {%- endfor %}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for turn in talk %}
    {{- '<|start_of_role|>' + turn['role'] + '<|end_of_role|>' + turn['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}
            {{- ' ' + controls | tojson()}}
        {%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""

# Llama 3.1 and 3.2: schemas in the first question, one call in an answer.
LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: python\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- first }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set question = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Functions need a question") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Answer with the call of a function:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- question + "<|eot_id|>"}}
{%- endif %}
{%- for turn in messages %}
    {%- if not (turn.role == 'ipython' or turn.role == 'tool' or 'tool_calls' in turn) %}
        {{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n'+ turn['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in turn %}
        {%- if not turn.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
        {%- set call = turn.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif turn.role == "tool" or turn.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if turn.content is mapping or turn.content is iterable %}
            {{- turn.content | tojson }}
        {%- else %}
            {{- turn.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Granite 3.3 asks for thoughts and answer in marks that are no tokens.
GRANITE33 = GRANITE3.replace(
    "Write thoughts after 'Here is my thought process:' and the answer after 'Here is my "
    "response:' every time.",
    "Write thoughts between <think></think> and the answer between <response></response>.",
)

FAMILIES = {
    "Qwen 2": QWEN2, "Qwen 2.5": QWEN25, "Qwen 3": QWEN3, "R1 distill": R1, "Gemma 2": GEMMA,
    "Gemma 3": GEMMA3, "Mistral": MISTRAL, "Ministral": MINISTRAL, "SmolLM3": SMOLLM3,
    "Phi-3": PHI3, "Phi-3.5": PHI35, "Phi-4-mini": PHI4, "OLMo 2": OLMO2, "Granite 3.2": GRANITE3,
    "Granite 3.3": GRANITE33, "Llama 3.1": LLAMA31,
}  # fmt: skip

SPECIALS = (
    "<s> </s> <|im_start|> <|im_end|> <｜User｜> <start_of_turn> <end_of_turn> [INST] [/INST] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS] "
    "[TOOL_RESULTS] [/TOOL_RESULTS] [THINK] [/THINK] <|system|> <|user|> <|assistant|> <|end|> "
    "<|start_of_role|> <|end_of_role|> <|end_of_text|> <|start_header_id|> <|end_header_id|> "
    "<|eot_id|> <start_of_image>"
).split()
# Added, not special, as in the files of Qwen 3 and DeepSeek.
ADDED = (
    "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <｜Assistant｜> "
    "<｜tool▁calls▁begin｜> <｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜> <|tool|> <|/tool|> "
    "<｜tool▁calls▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
).split()
