"""client.py EVENTS_A_REQUEST URL PAIRS: sends identify and track pairs with Segment's SDK, then waits to be stopped."""

import datetime
import hashlib
import sys
import time

from segment.analytics.client import Client

per_request, host, pairs = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
client = Client("key-of-the-sdk-0001", host=host, upload_size=per_request, on_error=lambda error, _: sys.exit(str(error)))

ATTRIBUTES = {
    "ageGroup": "25-34",
    "favoriteColor": "ocean blue",
    "interests": ["skin care", "fragrance", "make-up"],
    "newsletterOptIn": True,
    "purchaseIntent": "within three months",
    "quizScore": 87,
    "result": "The \u201cNight Owl\u201d: glows best after dark",
    "skinType": "combination",
}
TIMESTAMP = datetime.datetime.fromtimestamp(1_790_000_000.123, datetime.timezone.utc)


def put(send, *args, **kwargs):
    # A full queue drops the event and says so.
    while not send(*args, **kwargs)[0]:
        time.sleep(0.001)


print("ready", flush=True)
for number in range(pairs):
    email = f"Person.{number:016}@example.com"
    user_id = hashlib.sha256(email.lower().encode()).hexdigest()
    context = {
        "externalIds": [{"collection": "users", "encoding": "none", "id": user_id, "type": "emailSha256Hash"}]
    }
    traits = {"email": email, "emailSha256Hash": user_id, **ATTRIBUTES}
    put(client.identify, user_id, traits, context, TIMESTAMP)
    properties = {
        "questions": ATTRIBUTES,
        "surveyId": "n3zrik6g",
        "surveySessionId": f"y2P5ks05{number:016}",
        "surveyTitle": "Find your evening routine",
        "trafficSource": "Owned+Web",
    }
    put(client.track, user_id, "Survey Completed", properties, context, TIMESTAMP)
client.flush()
time.sleep(600)
