"""The prompt template of HunyuanVideo for videos: the words that stand around every prompt before the Llama reads it.

The wording was published with the model, which was trained on it, so it is data, not style: a changed character changes
every text state. It is a Llama-3 chat of one system message and one user message, the prompt being the latter.
"""

TEMPLATE_BEFORE_PROMPT = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
TEMPLATE_AFTER_PROMPT = "<|eot_id|>"

TEXT_LENGTH = 256  # rows of text the transformer is given at most: the tokens of the prompt and of what follows it

# Tokens that a tokenizer must know for the template to mean what it meant in training.
TEMPLATE_SPECIAL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def apply_prompt_template(prompt: str) -> str:
    """The whole text that the Llama reads for ``prompt``."""
    return TEMPLATE_BEFORE_PROMPT + prompt + TEMPLATE_AFTER_PROMPT
