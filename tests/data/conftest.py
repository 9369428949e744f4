"""A tokenizer of bytes: token = byte value, 256 = eos, 257 = bos."""

import pytest


class ByteTokenizer:
    eos_id = 256
    bos_id = 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(t for t in tokens if t < 256).decode()


class ChatTokenizer(ByteTokenizer):
    def apply_chat(self, messages, add_generation_prompt=True):
        pieces = []
        for message in messages:
            pieces.append((f"<{message['role']}>", False))
            pieces.append((message["content"], message["role"] == "assistant"))
        return pieces


class StringChatTokenizer(ByteTokenizer):
    def apply_chat(self, messages, add_generation_prompt=True):
        text = "".join(f"[{m['role'][0]}]{m['content']}" for m in messages)
        return text + "[a]" * add_generation_prompt


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return ChatTokenizer()


@pytest.fixture(scope="session")
def string_chat_tokenizer():
    return StringChatTokenizer()
