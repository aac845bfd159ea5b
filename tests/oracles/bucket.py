"""A real S3 server on loopback, and a client of its own for what lies in it.

Prints its URL, then answers a line of JSON for each that it reads: {"put": KEY, "file": PATH}, {"list": true}. It ends
with its standard input.
"""

import json
import logging
import sys

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "patches"


def main():
    # A line a request says nothing that a test reads.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )
    client.create_bucket(Bucket=BUCKET)
    print(json.dumps({"url": url}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "put" in asked:
            with open(asked["file"], "rb") as file:
                client.put_object(Bucket=BUCKET, Key=asked["put"], Body=file.read())
            print(json.dumps({}), flush=True)
        else:
            found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
            print(json.dumps({"keys": [each["Key"] for each in found]}), flush=True)
    server.stop()


main()
