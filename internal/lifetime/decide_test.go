package lifetime

import (
	"testing"
	"time"
)

func TestDecide(t *testing.T) {
	const h, m = time.Hour, time.Minute
	now := time.Date(2026, 1, 1, 0, 0, 0, 5e8, time.UTC)
	in := func(d time.Duration) time.Time { return now.Add(d) }
	promised, _ := Wish{Outage: 8 * h, Agent: 30 * h}.Resolve()
	named, _ := Wish{CA: 12 * h, X509: 2 * h, JWT: 10 * m}.Resolve()
	plain, _ := Wish{}.Resolve()
	for _, c := range []struct {
		name  string
		set   Set
		kind  Kind
		asked Asked
		want  []string // names, the one that counts first
		life  time.Duration
	}{
		{"nothing configured", plain, X509, Asked{Authority: in(5 * h)}, []string{BuiltIn, AuthorityEnd}, h},
		{"nothing configured, JWT", plain, JWT, Asked{}, []string{BuiltIn}, 5 * m},
		{"agents follow X.509-SVIDs", named, Agent, Asked{}, []string{"default_x509_svid_ttl"}, 2 * h},
		{"agents by themselves", promised, Agent, Asked{Authority: in(240 * h)}, []string{"agent_ttl", AuthorityEnd}, 30 * h},
		{"agents that prove their node again", plain, Agent, Asked{Reattest: m}, []string{ReattestPeriod, BuiltIn}, m},
		{"the server's own", named, Server, Asked{}, []string{"default_x509_svid_ttl"}, 2 * h},
		{"promised", promised, JWT, Asked{Authority: in(240 * h)}, []string{SurviveOutage, AuthorityEnd}, 20 * h},
		{"the entry's", named, X509, Asked{Entry: 3 * h, EntryEnd: in(4 * h)}, []string{"x509_svid_ttl", EntryEnd}, 3 * h},
		{"the entry ends", named, JWT, Asked{Entry: 3 * h, EntryEnd: in(2 * h)}, []string{EntryEnd, "jwt_svid_ttl"}, 2 * h},
		{"the authority ends", named, X509, Asked{Authority: in(h), Upstream: in(90 * m)}, []string{AuthorityEnd, UpstreamEnd, "default_x509_svid_ttl"}, h},
		{"what is above it ends", named, X509, Asked{Authority: in(h), Upstream: in(m)}, []string{UpstreamEnd, AuthorityEnd, "default_x509_svid_ttl"}, m},
		{"a mint", named, X509, Asked{Requested: 5 * h, Authority: in(9 * h)}, []string{Requested, AuthorityEnd}, 5 * h},
		{"an authority", named, CA, Asked{Upstream: in(20 * h)}, []string{"ca_ttl", UpstreamEnd}, 12 * h},
		{"an authority below", named, Downstream, Asked{Requested: h}, []string{Requested, "ca_ttl"}, h},
		{"an authority below that asks for more", named, Downstream, Asked{Requested: 99 * h}, []string{"ca_ttl", Requested}, 12 * h},
		{"of equal ones the more particular", named, X509, Asked{Entry: h, EntryEnd: in(h), Authority: in(h)}, []string{"x509_svid_ttl", EntryEnd, AuthorityEnd}, h},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := c.set.Decide(c.kind, c.asked, now)
			if end := in(c.life).Truncate(time.Second); !got[0].End.Equal(end) {
				t.Errorf("it ends at %v, want %v", got[0].End, end)
			}
			if len(got) != len(c.want) {
				t.Fatalf("limits %v, want %v", got, c.want)
			}
			for i, l := range got {
				if l.Name != c.want[i] {
					t.Errorf("limit %d is %v, want %s", i, l, c.want[i])
				}
			}
		})
	}
}
