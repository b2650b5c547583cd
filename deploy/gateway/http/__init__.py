"""The OpenAI-compatible HTTP side of the gateway."""

from deploy.gateway.http.app import create_http_app

__all__ = ["create_http_app"]
