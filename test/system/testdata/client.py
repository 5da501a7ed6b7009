"""A client of the Workload API that shares nothing with Plastron: Python's gRPC,
stubs made from workload.proto, and openssl to judge what comes.

    client.py SOCKET SPIFFE-ID STUBS

It ends with status 0 and the names of what it saw, or with what was wrong.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time

import grpc

socket, identity, stubs = sys.argv[1:]
sys.path.insert(0, stubs)
import workload_pb2 as pb  # noqa: E402
import workload_pb2_grpc as rpc  # noqa: E402

HEADER = (("workload.spiffe.io", "true"),)
DOMAIN = "/".join(identity.split("/")[:3])
WAIT = 60  # seconds


def check(holds, what):
    if not holds:
        sys.exit("wrong: " + what)


def saw(what):
    print("saw", what, flush=True)


def openssl(*args, stdin=None):
    done = subprocess.run(("openssl",) + args, input=stdin, capture_output=True)
    check(done.returncode == 0, "openssl %s: %s" % (" ".join(args), done.stderr.decode()))
    return done.stdout


def certificates(der):
    """Cuts concatenated DER into PEM certificates."""
    found = []
    while der:
        check(der[0] == 0x30 and der[1] == 0x82, "a certificate is not DER")
        size = 4 + int.from_bytes(der[2:4], "big")
        found.append(openssl("x509", "-inform", "DER", stdin=der[:size]))
        der = der[size:]
    return found


def decode(part):
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def unsigned(number):
    """An ASN.1 INTEGER."""
    body = number.lstrip(b"\0") or b"\0"
    if body[0] & 0x80:
        body = b"\0" + body
    return bytes([2, len(body)]) + body


def refuses(call, code, what):
    try:
        call()
    except grpc.RpcError as err:
        check(err.code() == code, "%s: %s, not %s" % (what, err.code(), code))
        return
    sys.exit("wrong: %s was answered" % what)


def first(stream):
    message = next(iter(stream))
    stream.cancel()
    return message


def headers(api):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for given in ((), (("workload.spiffe.io", "True"),), HEADER + HEADER):
        for name in ("FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"):
            refuses(lambda: first(getattr(api, name)(pb.Empty(), metadata=given, timeout=WAIT)), invalid, "%s with %r" % (name, given))
        wanted, token = pb.JWTSVIDWanted(audience=["a"]), pb.Token(audience="a", token="b")
        refuses(lambda: api.FetchJWTSVID(wanted, metadata=given, timeout=WAIT), invalid, "FetchJWTSVID with %r" % (given,))
        refuses(lambda: api.ValidateJWTSVID(token, metadata=given, timeout=WAIT), invalid, "ValidateJWTSVID with %r" % (given,))
    saw("no answer without the header")


def x509(api, work):
    message = first(api.FetchX509SVID(pb.Empty(), metadata=HEADER, timeout=WAIT))
    check([s.spiffe_id for s in message.svids] == [identity], "X.509-SVIDs are for %s" % [s.spiffe_id for s in message.svids])
    svid = message.svids[0]
    bundles = first(api.FetchX509Bundles(pb.Empty(), metadata=HEADER, timeout=WAIT)).bundles
    check(bundles[DOMAIN] == svid.bundle, "the bundle of the SVID is not the one of the trust domain")
    chain, roots = certificates(svid.chain), certificates(svid.bundle)
    paths = {}
    for name, data in {"leaf": chain[0], "chain": b"".join(chain), "roots": b"".join(roots)}.items():
        paths[name] = os.path.join(work, name + ".pem")
        with open(paths[name], "wb") as f:
            f.write(data)
    openssl("verify", "-x509_strict", "-CAfile", paths["roots"], "-untrusted", paths["chain"], paths["leaf"])
    names = openssl("x509", "-in", paths["leaf"], "-noout", "-ext", "subjectAltName").decode()
    check("URI:" + identity in names, "the certificate is for " + names)
    public = openssl("pkey", "-inform", "DER", "-pubout", stdin=svid.key)
    check(public == openssl("x509", "-in", paths["leaf"], "-noout", "-pubkey"), "key and certificate differ")
    saw("an X.509-SVID")


def jwt(api, work):
    wanted = pb.JWTSVIDWanted(audience=["python", "other"], spiffe_id=identity)
    answer = api.FetchJWTSVID(wanted, metadata=HEADER, timeout=WAIT)
    check([s.spiffe_id for s in answer.svids] == [identity], "JWT-SVIDs are for %s" % [s.spiffe_id for s in answer.svids])
    token = answer.svids[0].token
    signed, _, signature = token.rpartition(".")
    header, claims = (json.loads(decode(p)) for p in signed.split("."))
    check(claims["sub"] == identity and claims["aud"] == ["python", "other"], "claims are %s" % claims)
    check(time.time() < claims["exp"] < time.time() + 3600, "exp is %s" % claims["exp"])

    keys = json.loads(first(api.FetchJWTBundles(pb.Empty(), metadata=HEADER, timeout=WAIT)).bundles[DOMAIN])["keys"]
    key = {k["kid"]: k for k in keys}[header["kid"]]
    check(header["alg"] == "ES256" and key["kty"] == "EC" and key["crv"] == "P-256", "header %s, key %s" % (header, key))
    # The fixed beginning of a P-256 SubjectPublicKeyInfo with an uncompressed point (RFC 5480).
    spki = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004") + decode(key["x"]) + decode(key["y"])
    raw = decode(signature)
    pair = unsigned(raw[:32]) + unsigned(raw[32:])
    for name, data in {"key": openssl("pkey", "-pubin", "-inform", "DER", stdin=spki), "sig": bytes([0x30, len(pair)]) + pair}.items():
        with open(os.path.join(work, name), "wb") as f:
            f.write(data)
    openssl("dgst", "-sha256", "-verify", os.path.join(work, "key"), "-signature", os.path.join(work, "sig"), stdin=signed.encode())
    saw("a JWT-SVID")

    valid = api.ValidateJWTSVID(pb.Token(audience="other", token=token), metadata=HEADER, timeout=WAIT)
    check(valid.spiffe_id == identity and valid.claims["sub"] == identity, "validated %s" % valid)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    changed = token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB")
    for what, bad in {"another audience": pb.Token(audience="nobody", token=token), "a changed signature": pb.Token(audience="other", token=changed)}.items():
        refuses(lambda: api.ValidateJWTSVID(bad, metadata=HEADER, timeout=WAIT), invalid, "validation for " + what)
    refuses(lambda: api.FetchJWTSVID(pb.JWTSVIDWanted(), metadata=HEADER, timeout=WAIT), invalid, "FetchJWTSVID without audience")
    refuses(lambda: api.FetchJWTSVID(pb.JWTSVIDWanted(audience=["a"], spiffe_id=DOMAIN + "/other"), metadata=HEADER, timeout=WAIT),
            grpc.StatusCode.PERMISSION_DENIED, "FetchJWTSVID for another's ID")
    saw("validation")


with grpc.insecure_channel("unix://" + socket) as channel, tempfile.TemporaryDirectory() as work:
    api = rpc.SpiffeWorkloadAPIStub(channel)
    headers(api)
    x509(api, work)
    jwt(api, work)
