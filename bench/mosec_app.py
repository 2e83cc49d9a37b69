"""MOSEC (mosec 0.9.8) with one worker that answers at once. Run by an environment of its own: it is not ours."""

from typing import Any

from mosec import Server, Worker


class Null(Worker):  # type: ignore[misc]
    """Takes the bytes as they are and answers a fixed JSON."""

    def deserialize(self, data: bytes) -> bytes:
        """The body is no JSON."""
        return data

    def forward(self, data: bytes) -> Any:
        """No computation."""
        return {"predictions": [{"label": "0", "class_id": 0, "score": 1.0}]}


if __name__ == "__main__":
    server = Server()
    server.append_worker(Null, num=1)
    server.run()
