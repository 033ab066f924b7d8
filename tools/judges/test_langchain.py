"""langchain's standard tests for chat models, against ChatOpenAI pointed at mxn.

Collected by run.py with MXN_JUDGES_URL set; needs langchain-tests and langchain-openai.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAIOnMxn(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "decoder",
            "base_url": f"{os.environ['MXN_JUDGES_URL']}/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 64,
            "stream_usage": True,  # off by default when base_url is not OpenAI's
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "decoder"
