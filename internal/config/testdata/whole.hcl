# every kind of value
server {
    bind_address = "127.0.0.1"
    bind_port = "8081" // quoted, as in the files that SPIRE ships
    trust_domain = "example.org"
    ca_ttl = "24h"
    prune = "1h30m"
    audit_log_enabled = true
    admin_ids = [
        "spiffe://example.org/a",
        "spiffe://example.org/b",
    ]
    ratelimit = { attestation = 7 }
    ratio = 0.5
    federates_with "one.test" { bundle_endpoint_url = "https://one.test" }
    federates_with "two.test" { bundle_endpoint_url = "https://two.test" }
    names { a = "x", "b" = "y" }
    listener { attestation = 1 }
    listener { signing = 2 }
    join_token = ""
    domains = ["a.test"]
    raw { anything = [1, [true, "x"]] }
}

/* plugins keep their order */
plugins {
    KeyManager "disk" {
        plugin_data {
            keys_path = "/var/lib/keys.json"
        }
    }
    NodeAttestor "join_token" {
        plugin_data {}
    }
    NodeAttestor "other" {
        plugin_cmd = "/bin/other"
        plugin_args = ["-v"]
        enabled = true
    }
}
