"""The OpenAPI 3.1 document of a worker's HTTP, as served at `/v1/openapi.json`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from stream.model.heads import output_names
from stream.routing import LARGEST_BATCH
from stream.settings import Settings

__all__ = ["openapi_document"]


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The document, for a worker with these settings."""
    has_token = settings.worker.http_token_file is not None
    refusals = {"401": _problem("The token is missing or wrong.")} if has_token else {}
    redirects = (
        {"307": {"description": "Another worker has the client; it is at `Location`.", "headers": {"Location": _TEXT}}}
        if settings.worker.http_routing == "redirect"
        else {}
    )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Livestate worker",
            "version": _version(),
            "description": "Clients' embeddings, current to the last event. Any worker answers for any client.",
        },
        "paths": {
            "/v1/clients/{client_id}": {
                "get": {
                    "operationId": "getClient",
                    "summary": "The state of one client",
                    "parameters": [
                        {
                            "name": "client_id", "in": "path", "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                    "responses": {
                        "200": _json("The client's row as it is now.", "Client"),
                        "404": _problem("Nobody has a row of this client: it is unknown, or has expired."),
                        **_UNAVAILABLE, **redirects, **refusals,
                    },
                }
            },
            "/v1/clients:batchGet": {
                "post": {
                    "operationId": "batchGetClients",
                    "summary": f"The states of up to {LARGEST_BATCH:,} clients",
                    "requestBody": {"required": True, "content": _content("BatchGet")},
                    "responses": {
                        "200": _json("The clients that have a row, in the order asked for, and those that have none.",
                                     "Batch"),
                        "400": _problem("The body is not what is described here."),
                        "413": _problem("The body is too large."),
                        "415": _problem("The body is not JSON."),
                        **_UNAVAILABLE, **refusals,
                    },
                }
            },
            "/v1/status": {
                "get": {
                    "operationId": "getStatus",
                    "summary": "What this worker serves, and who serves the rest",
                    "responses": {"200": _json("The worker.", "Status"), **refusals},
                }
            },
        },
        "components": {"schemas": _schemas(settings)},
    }  # fmt: skip
    if has_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


_TEXT = {"schema": {"type": "string"}}
_NUMBER_OR_NULL = {"type": ["integer", "null"]}


def _content(schema: str, media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _json(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": _content(schema)}


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, "content": _content("Problem", "application/problem+json")}


_UNAVAILABLE = {
    "503": {
        **_problem("The client's partition changes hands, or its owner does not answer."),
        "headers": {"Retry-After": _TEXT},
    }
}


def _schemas(settings: Settings) -> dict[str, Any]:
    probability = {"type": "number", "minimum": 0, "maximum": 1}
    tasks = {
        name: {"type": "number"} if task.kind == "regression" else probability
        for task_name, task in settings.tasks.items()
        for name in output_names(task_name, task)
    }
    by_partition = {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}}
    return {
        "Client": _object(
            client_id={"type": "string"},
            events_seen={"type": "integer", "minimum": 1},
            timestamp_ms={"type": "integer", "description": "Of its last event, UTC milliseconds."},
            age_s={"type": "number", "minimum": 0, "description": "Time since its last event."},
            offset={"type": "integer", "minimum": 0, "description": "Of its last event."},
            parameter_version={"type": "integer", "minimum": 1},
            vector={"type": "array", "items": {"type": "number"}},
            vector_base64={"type": "string", "description": "The vector's float32, little endian."},
            predictions={
                "type": "object",
                "properties": tasks,
                "additionalProperties": False,
                "description": "Of the row as it is now, for an event whose fields are those of the average one.",
            },
        ),
        "BatchGet": _object(
            client_ids={
                "type": "array",
                "minItems": 1,
                "maxItems": LARGEST_BATCH,
                "items": {"type": "string", "minLength": 1},
            }
        ),
        "Batch": _object(
            clients={"type": "array", "items": {"$ref": "#/components/schemas/Client"}},
            missing={"type": "array", "items": {"type": "string"}},
        ),
        "Status": _object(
            address={"type": "string", "description": "Where others reach this worker."},
            partitions={"type": "array", "items": {"type": "integer"}, "description": "That it serves."},
            owners={
                **by_partition,
                "additionalProperties": {"type": ["string", "null"]},
                "description": "Address of the worker that serves each partition.",
            },
            positions={
                **by_partition,
                "additionalProperties": {"type": "integer"},
                "description": "Next offset of each partition that it serves.",
            },
            lag={
                **by_partition,
                "additionalProperties": _NUMBER_OR_NULL,
                "description": "Events of each partition that it serves which are not applied yet, where known.",
            },
            parameter_version=_NUMBER_OR_NULL,
            trunk={"type": ["string", "null"]},
            rebuilding={
                "type": "array",
                "items": {"type": "integer"},
                "description": "Partitions whose rows wait for another trunk.",
            },
        ),
        "Problem": _object(
            type={"type": "string"},
            title={"type": "string"},
            status={"type": "integer"},
            detail={"type": "string"},
        ),
    }


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _version() -> str:
    try:
        return version("livestate")
    except PackageNotFoundError:
        return "0"
