package x509pop

import (
	"crypto/x509/pkix"
	"strings"
	"testing"
	"time"

	"github.com/plastron/plastron/internal/fault"
)

func data() pathData {
	n := name{pkix.Name{CommonName: "Node-1.example.org", Organization: []string{"a", "b"}, OrganizationalUnit: []string{"x/y"}}}
	return pathData{PluginName: Name, TrustDomain: "example.org", Fingerprint: "0a", SerialNumberHex: "0b", SVIDPathTrimmed: "rack/n1",
		Subject: n, Issuer: n, dns: []string{"d1"}, pairs: []pair{{"dc", "eu"}, {"twice", "1"}, {"twice", "2"}}}
}

func TestTemplates(t *testing.T) {
	for text, want := range map[string]string{
		"{{ .PluginName }}/{{ .Fingerprint }}":                                                    "/0a",
		"/x509pop/{{ .SVIDPathTrimmed }}":                                                         "/rack/n1",
		`/x509pop/{{ .Subject.CommonName | trimSuffix ".example.org" | lower }}`:                  "/node-1",
		`/x509pop/{{ index .Subject.Organization 1 }}/{{ join "-" .Subject.Organization }}`:       "/b/a-b",
		`/x509pop/{{ if hasPrefix "Node" .Subject.CommonName }}n{{ else }}m{{ end }}`:             "/n",
		`/x509pop/{{ with .Issuer.CommonName }}{{ trunc 4 . }}{{ end }}`:                          "/Node",
		`/x509pop/{{ $x := .SerialNumberHex }}{{ default "none" $x }}{{/* why */}}`:               "/0b",
		`/x509pop/{{ replace "." "_" (upper .TrustDomain) }}/{{ index .DNSNames 0 }}`:             "/EXAMPLE_ORG/d1",
		`/x509pop/{{ repeat 3 "a" }}{{ trim " b " }}{{ trimAll "-" "-c-" }}`:                      "/aaabc",
		`/x509pop/{{ sha256sum "a" }}`:                                                            "/ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
		`/x509pop/{{ trimPrefix "Node-" .Subject.CommonName }}{{ if contains "x" "y" }}{{ end }}`: "/1.example.org",
	} {
		p, err := parseTemplate(text, false)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, inside, err := p.path(data()); err != nil || !inside || got != want {
			t.Errorf("%s: %q, %v, %v, want %q", text, got, inside, err, want)
		}
		if _, err := p.sample(td); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestTemplatesRefusedAtLoad(t *testing.T) {
	for id, text := range map[string]string{
		"F19 env":             `/x509pop/{{ env "HOME" }}`,
		"F19 include":         `/x509pop/{{ include "x" }}`,
		"F19 printf":          `/x509pop/{{ printf "%1000000d" 1 }}`,
		"F19 print":           `{{ $a := "aaaa" }}{{ $a = print $a $a }}/x509pop/{{ $a }}`,
		"F19 call":            `/x509pop/{{ call .X }}`,
		"F19 html":            `/x509pop/{{ html "x" }}`,
		"a hidden call":       `/x509pop/{{ if (and true (print "x")) }}a{{ end }}`,
		"range":               `/x509pop/{{ range 1000000000 }}{{ end }}`,
		"define":              `{{ define "a" }}{{ template "a" }}{{ end }}/x509pop/a`,
		"template":            `/x509pop/{{ template "agent_path_template" }}`,
		"block":               `/x509pop/{{ block "b" . }}{{ end }}`,
		"syntax":              `/x509pop/{{ .Subject`,
		"4 KiB and a byte":    `/x509pop/` + strings.Repeat("a", maxTemplate),
		"only a definition":   `{{ define "a" }}x{{ end }}`,
		"a break":             `{{ range 3 }}{{ break }}{{ end }}`,
		"unknown in a branch": `{{ if true }}a{{ else }}{{ env "X" }}{{ end }}`,
		"unknown in a pipe":   `{{ .PluginName | env }}`,
	} {
		t.Run(id, func(t *testing.T) {
			if _, err := parseTemplate(text, false); fault.ReasonOf(err) != "agent_path_template_invalid" {
				t.Errorf("parseTemplate() = %v, want a refusal", err)
			}
		})
	}
	for id, text := range map[string]string{ // found by the sample
		"unknown field":    `/x509pop/{{ .Nothing }}`,
		"unknown name":     `/x509pop/{{ .Subject.Nothing }}`,
		"outside":          `/cn/{{ .Subject.CommonName }}`,
		"only the name":    `/x509pop`,
		"prefix of a name": `/x509popX/a`,
		"escape":           `/x509pop/../join_token/a`,
	} {
		t.Run(id, func(t *testing.T) {
			p, err := parseTemplate(text, false)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := p.sample(td); fault.ReasonOf(err) != "agent_path_template_invalid" {
				t.Errorf("sample() = %q, %v, want a refusal", got, err)
			}
		})
	}
	p, err := parseTemplate(`/x509pop/{{ .URISanSelectors.rack }}`, false)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.sample(td); err != nil || got != "spiffe://example.org/spire/agent/x509pop/value" {
		t.Errorf("sample() = %q, %v", got, err)
	}
}

func TestTemplateOutput(t *testing.T) {
	long := data()
	long.SVIDPathTrimmed = strings.Repeat("a", maxPath)
	for id, c := range map[string]struct {
		text string
		data pathData
	}{
		"F20 repeat":            {`/x509pop/{{ repeat 1000000000 "a" }}`, data()},
		"F20 a lot of little":   {`/x509pop/` + strings.Repeat(`{{ repeat 2000 "a" }}`, 100), data()},
		"F20 replace":           {`{{ $a := repeat 2000 "a" }}{{ $a = replace "a" $a $a }}{{ $a }}`, data()},
		"F20 replace nothing":   {`/x509pop/{{ replace "" "bbbb" .TrustDomain }}`, data()},
		"F20 join":              {`/x509pop/{{ join (repeat 2000 "a") .Subject.Organization }}`, data()},
		"repeat less":           {`/x509pop/{{ repeat -1 "a" }}`, data()},
		"trunc less":            {`/x509pop/{{ trunc -1 "a" }}`, data()},
		"F21 dots":              {`/x509pop/..`, data()},
		"F21 empty":             {`{{ if false }}a{{ end }}`, data()},
		"F21 slash":             {`/`, data()},
		"F21 3,000 bytes":       {`/x509pop/` + strings.Repeat("a", 3000), data()},
		"F21 newline":           {"/x509pop/a\n", data()},
		"F21 trailing slash":    {`/x509pop/`, data()},
		"F21 double slash":      {`/x509pop//a`, data()},
		"F21 long path":         {`/x509pop/{{ .SVIDPathTrimmed }}`, long},
		"a name with a slash":   {`/x509pop/{{ index .Subject.OrganizationalUnit 0 }}`, data()},
		"a list with a slash":   {`/x509pop/{{ join "-" .Issuer.OrganizationalUnit }}`, data()},
		"a list that is short":  {`/x509pop/{{ index .Subject.Organization 2 }}`, data()},
		"a missing pair":        {`/x509pop/{{ .URISanSelectors.none }}`, data()},
		"a key with two values": {`/x509pop/{{ .URISanSelectors.dc }}`, data()},
	} {
		t.Run(id, func(t *testing.T) {
			p, err := parseTemplate(c.text, false)
			if err != nil {
				t.Fatal(err)
			}
			// F20: 10 ms. A busy machine holds up one try, and not all of them.
			quickest := time.Hour
			for try := 0; try < 20 && quickest > 100*time.Millisecond; try++ {
				began := time.Now()
				got, _, err := p.path(c.data)
				quickest = min(quickest, time.Since(began))
				if fault.ReasonOf(err) != "agent_path_invalid" || fault.KindOf(err) != fault.Denied {
					t.Fatalf("path() = %q, %v, want agent_path_invalid", got, err)
				}
			}
			if quickest > 100*time.Millisecond {
				t.Errorf("it took %v", quickest)
			}
		})
	}
}

func FuzzTemplate(f *testing.F) {
	f.Add("/x509pop/{{ .Subject.CommonName | lower }}", "a")
	f.Add(`/x509pop/{{ repeat 1000000000 "a" }}`, "..")
	f.Add(`{{ $a := .Fingerprint }}{{ $a = replace "a" $a $a }}{{ $a }}`, "a/b")
	f.Fuzz(func(t *testing.T, text, cn string) {
		p, err := parseTemplate(text, false)
		if err != nil {
			return
		}
		d := data()
		d.Subject = name{pkix.Name{CommonName: cn}}
		path, inside, err := p.path(d)
		if err == nil && (!inside || !strings.HasPrefix(path, "/") || len(path) > maxPath || strings.Contains(path, "..") && strings.Contains(path, "/../")) {
			t.Errorf("path() = %q, %v", path, inside)
		}
	})
}
