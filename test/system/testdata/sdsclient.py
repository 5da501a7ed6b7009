"""A client of Envoy's secret discovery that shares nothing with Plastron or with
Envoy's Go code: Python's gRPC, stubs made from sds.proto, and openssl to judge what
comes.

    sdsclient.py SOCKET SPIFFE-ID STUBS

It says what it saw, waits for one push, refuses that, and ends with status 0, or
with what was wrong.
"""

import os
import queue
import subprocess
import sys
import tempfile

import grpc

socket, identity, stubs = sys.argv[1:]
sys.path.insert(0, stubs)
import sds_pb2 as pb  # noqa: E402
import sds_pb2_grpc as rpc  # noqa: E402

TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
DOMAIN = "/".join(identity.split("/")[:3])
NAMES = [identity, DOMAIN, "nonsense"]
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


def read(answer):
    """Verifies an answer and returns its certificate."""
    check(answer.type_url == TYPE + "Secret" and answer.version_info and answer.nonce, "an answer without type, version or nonce")
    secrets = {}
    for resource in answer.resources:
        check(resource.type_url == TYPE + "Secret", "a resource that is no secret")
        secret = pb.Secret.FromString(resource.value)
        secrets[secret.name] = secret
    check(sorted(secrets) == sorted([identity, DOMAIN]), "the secrets are %s" % sorted(secrets))
    lost = [(e.resource_name.name, e.error_detail.code) for e in answer.resource_errors]
    check(lost == [("nonsense", grpc.StatusCode.INVALID_ARGUMENT.value[0])], "missing is %s" % lost)

    validator = secrets[DOMAIN].validation_context.custom_validator_config
    check(validator.name == "envoy.tls.cert_validator.spiffe", "the validator is %s" % validator.name)
    check(validator.typed_config.type_url == TYPE + "SPIFFECertValidatorConfig", "its type is %s" % validator.typed_config.type_url)
    domains = pb.SPIFFECertValidatorConfig.FromString(validator.typed_config.value).trust_domains
    check([d.name for d in domains] == [DOMAIN.removeprefix("spiffe://")], "trusted are %s" % [d.name for d in domains])

    chain = secrets[identity].tls_certificate.certificate_chain.inline_bytes
    key = secrets[identity].tls_certificate.private_key.inline_bytes
    with tempfile.TemporaryDirectory() as scratch:
        roots = os.path.join(scratch, "roots.pem")
        with open(roots, "wb") as f:
            f.write(domains[0].trust_bundle.inline_bytes)
        openssl("verify", "-CAfile", roots, stdin=chain)
    check(b"URI:" + identity.encode() in openssl("x509", "-noout", "-ext", "subjectAltName", stdin=chain), "the certificate says another ID")
    check(openssl("x509", "-noout", "-pubkey", stdin=chain) == openssl("pkey", "-pubout", stdin=key), "the key is another's")
    return chain


api = rpc.SecretDiscoveryServiceStub(grpc.insecure_channel("unix:" + socket))
requests = queue.Queue()
answers = api.StreamSecrets(iter(requests.get, None), timeout=WAIT)


def ask(**what):
    requests.put(pb.DiscoveryRequest(node=pb.Node(id="python", cluster="test"), type_url=TYPE + "Secret", resource_names=NAMES, **what))


ask()
first = next(answers)
before = read(first)
saw("an answer")
ask(version_info=first.version_info, response_nonce=first.nonce)
second = next(answers)
check(read(second) != before, "the push has the same certificate")
check(second.version_info != first.version_info, "the push has the same version")
saw("a push")
ask(version_info=first.version_info, response_nonce=second.nonce, error_detail=pb.Status(code=13, message="python does not like it"))

fetched = api.FetchSecrets(pb.DiscoveryRequest(resource_names=[identity], type_url=TYPE + "Secret"), timeout=WAIT)
check(len(fetched.resources) == 1, "FetchSecrets gave %d secrets" % len(fetched.resources))
try:
    api.FetchSecrets(pb.DiscoveryRequest(resource_names=["nonsense"]), timeout=WAIT)
    sys.exit("wrong: FetchSecrets gave nonsense")
except grpc.RpcError as err:
    check(err.code() == grpc.StatusCode.INVALID_ARGUMENT and "(secret_unknown)" in err.details(), "FetchSecrets: %s" % err)
saw("single answers")
sys.stdin.read()  # the stream stays until the other side has looked
requests.put(None)
