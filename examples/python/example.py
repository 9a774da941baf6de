"""A backend in Python: registers a phone, records a choice, reports a comment, follows the push.

Generate the stubs first (run.sh does): python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. \
    proto/nudged/v1/*.proto
"""

import os
import pathlib
import sys
import uuid

import grpc

from nudged.v1 import device_pb2, push_service_pb2 as pb, push_service_pb2_grpc

APP = "ifriendspet"
USER = "choco-python"


def main() -> None:
    # The retry rule is in a file that every language reads: UNAVAILABLE and RESOURCE_EXHAUSTED are tried again, later
    # when the server says so. Only what is safe to repeat may be retried; the idempotency key makes NotifyEvent so.
    here = pathlib.Path(__file__).resolve().parent
    config = pathlib.Path(os.environ.get("NUDGED_SERVICE_CONFIG", here.parent / "service_config.json")).read_text()
    channel = grpc.insecure_channel(
        os.environ.get("NUDGED_ADDRESS", "127.0.0.1:50051"), options=[("grpc.service_config", config)]
    )
    key = os.environ.get("NUDGED_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    nudged = push_service_pb2_grpc.PushServiceStub(channel)

    nudged.RegisterDevice(
        pb.RegisterDeviceRequest(
            app_id=APP, user_id=USER, platform=device_pb2.Device.APNS, token="a1" * 32, locale="ko-KR"
        ),
        metadata=metadata,
    )
    nudged.SetOptIn(
        pb.SetOptInRequest(app_id=APP, user_id=USER, opted_in=True, source="settings-screen"), metadata=metadata
    )

    # Follow what becomes of events. The first message says that the watch has begun. After a broken stream, open it again
    # with the last message's cursor, and nothing is missed.
    watch = nudged.WatchDeliveries(
        pb.WatchDeliveriesRequest(app_id=APP, filter=pb.WatchDeliveriesRequest.Filter(user_id=USER)),
        metadata=metadata,
        timeout=30,
    )
    next(watch)

    event = pb.NotifyEventRequest(
        app_id=APP,
        event_type="comment.created",
        idempotency_key=f"comment-{uuid.uuid4()}",
        user_ids=[USER],
        actor_id="bori",
        content=pb.Content(title="New comment", body="Bori: so cute!"),
    )
    event.data.update({"post": 42})
    accepted = nudged.NotifyEvent(event, metadata=metadata)
    again = nudged.NotifyEvent(event, metadata=metadata)
    assert again.duplicate and again.notification_id == accepted.notification_id, "a repeat gives the first answer"

    for message in watch:
        if message.delivery.notification_id == accepted.notification_id:
            print(f"python: told of {pb.Delivery.State.Name(message.delivery.state)}")
            break
    watch.cancel()

    # Or ask.
    answer = nudged.ListDeliveries(
        pb.ListDeliveriesRequest(app_id=APP, notification_id=accepted.notification_id), metadata=metadata
    )
    for one in answer.deliveries:
        print(f"python: {one.user_id} {pb.Delivery.State.Name(one.state)} {one.reason} {one.nudged_id}")
    if [one.state for one in answer.deliveries] != [pb.Delivery.SENT]:
        sys.exit("python: not sent")


if __name__ == "__main__":
    main()
