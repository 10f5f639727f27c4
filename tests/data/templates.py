"""Chat templates in the styles of the families, and tokenizers that know their special tokens."""

from functools import cache

from tests.peer import CHATML, TEXT

MARKED = (  # ChatML that says itself where the assistant speaks
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (  # a default system message
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (  # trims what is said; no line break after a turn
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (  # no header for the assistant, a space before what it says, refuses roles out of turn
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # an empty thought before the last answer only; thoughts of earlier turns are taken out
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set said = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in message.content else '' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- said + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI3 = (  # the end of the text at the very end, unless generation follows
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # no special token ends a turn
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
TOOLED = (  # one word after another: tools before the conversation, calls after what is said
    "{% if tools %}{{ '<|im_start|> system' }}{% for t in tools %}{{ ' ' + t.function.name }}{% endfor %}"
    "{{ ' <|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ ' ' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}{{ ' ' + key + ' ' + value }}{% endfor %}{% endfor %}"
    "{{ ' <|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"
)
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>"),
    *("</s>", "<|user|>", "<|assistant|>", "<|end|>"),
]


@cache
def tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>", trim_offsets: bool = True):
    """A byte-level BPE tokenizer of 450 tokens that knows all of SPECIAL; every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT.splitlines(),
        trainers.BpeTrainer(vocab_size=450, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    names = {"eos_token": eos, "bos_token": "<s>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


@cache
def word_tokenizer():
    """One token a word, white space lost, ChatML: what a test can count by eye."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "system",
        "user",
        "assistant",
        *"abcdefghijklmnopqrstuvwxyz",
        "tool",
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **names)


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """user, assistant, user, ... in turns, after a system message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
