package mirror

import (
	"fmt"
	"slices"
	"time"

	"github.com/plastron/plastron/api/plastron/sync/v1"
	"github.com/plastron/plastron/internal/agentid"
	"github.com/plastron/plastron/internal/entry"
)

// action is something that may happen, with its share of all. Those of a share
// of 1 or 2 upset much: each seed has a third of them.
type action struct {
	share int
	name  string
	do    func(*model) string
}

const upsets = 2

// modelActions are in order, so that a seed means the same each time.
func modelActions() []action {
	millis := func(w *model, n int) time.Duration { return time.Duration(w.rnd.IntN(n)) * time.Millisecond }
	anyServer := func(w *model) *modelServer { return w.servers[w.rnd.IntN(len(w.servers))] }
	return []action{
		{10, "a grant changes", (*model).grant},
		{4, "a grant goes", func(w *model) string {
			id := fmt.Sprintf("g%d", w.rnd.IntN(10))
			w.commit(func(s *state) {
				delete(s.bodies, "g/"+id)
				delete(s.grants, id)
			})
			return id
		}},
		{3, "a federated bundle changes", (*model).federate},
		{2, "another authority signs", func(w *model) string {
			return w.authorities(func(s *state) { s.next = min(s.next+1, len(w.cas)) })
		}},
		{1, "all authorities but the newest are tainted", func(w *model) string { return w.authorities(func(s *state) { s.tainted = s.next - 1 }) }},
		{1, "all authorities but the newest are revoked", func(w *model) string { return w.authorities(func(s *state) { s.first = s.next - 1 }) }},
		{30, "the agent gets on", func(w *model) string {
			w.work()
			w.connect()
			w.deliver(w.rnd.IntN(20))
			w.sign(true)
			w.pass(millis(w, 200))
			return ""
		}},
		{14, "the agent connects", (*model).connect},
		{4, "the connection breaks", func(w *model) string { w.hangUp(errAway); return "" }},
		{4, "a server is restarted", func(w *model) string {
			s := anyServer(w)
			if w.session != nil && w.servers[w.session.server] == s {
				w.hangUp(errAway)
			}
			s.up, s.lag, s.at = true, false, w.head
			return "it is at " + s.at.name()
		}},
		{2, "a server goes away", func(w *model) string {
			s := anyServer(w)
			if w.session != nil && w.servers[w.session.server] == s {
				w.hangUp(errAway)
			}
			s.up = false
			return fmt.Sprint(slices.Index(w.servers, s))
		}},
		{3, "a server lags", func(w *model) string {
			i := w.rnd.IntN(len(w.servers))
			w.servers[i].lag = len(w.servers) > 1 && i > 0
			return fmt.Sprint(i)
		}},
		{5, "a server catches up", func(w *model) string {
			i := w.rnd.IntN(len(w.servers))
			if w.servers[i].up {
				w.servers[i].lag = w.rnd.IntN(2) == 0 && w.servers[i].lag
				w.catchUp(i)
			}
			return fmt.Sprint(i)
		}},
		{1, "the store is restored", (*model).restore},
		{30, "messages arrive", func(w *model) string { w.deliver(1 + w.rnd.IntN(4)); return "" }},
		{14, "a batch is signed", func(w *model) string { return w.sign(w.rnd.IntN(5) > 0) }},
		{14, "the agent's job ends", (*model).work},
		{6, "a moment passes", func(w *model) string { w.pass(millis(w, 3000)); return "" }},
		{5, "time passes", func(w *model) string { w.pass(millis(w, 90_000)); return "" }},
		{1, "the machine sleeps", func(w *model) string {
			d := millis(w, 3_600_000)
			if w.rnd.IntN(4) == 0 {
				d = 30 * 24 * time.Hour
			}
			w.at, w.boot = w.at.Add(d), w.boot+d
			w.live(agentid.Slept{})
			w.look()
			return d.String()
		}},
		{5, "the clocks are right again", func(w *model) string {
			w.skew = 0
			for _, s := range w.servers {
				s.skew = 0
			}
			w.look()
			return ""
		}},
		{2, "the agent's clock is set", func(w *model) string {
			w.skew = []time.Duration{millis(w, 20_000), -millis(w, 20_000), millis(w, 3_600_000), -millis(w, 3_600_000), 10 * 365 * 24 * time.Hour, -10 * 365 * 24 * time.Hour}[w.rnd.IntN(6)]
			w.look()
			return w.skew.String()
		}},
		{1, "a server's clock is set", func(w *model) string {
			s := anyServer(w)
			s.skew = []time.Duration{0, 0, millis(w, 7_200_000), -millis(w, 7_200_000)}[w.rnd.IntN(4)]
			return s.skew.String()
		}},
		{8, "a caller comes", (*model).join},
		{3, "a caller goes", func(w *model) string {
			key := fmt.Sprintf("s%d", w.rnd.IntN(6))
			if w.agent != nil && w.agent.subs[key] != nil {
				w.agent.m.leave(w.agent.subs[key].group, w.at.Add(w.skew))
				delete(w.agent.subs, key)
				delete(w.callers, key)
			}
			return key
		}},
		{3, "the server compares", func(w *model) string {
			if w.session != nil && w.session.follow {
				w.session.stream = append(w.session.stream, w.current())
			}
			return ""
		}},
		{2, "a message is lost in a server", func(w *model) string {
			if w.session == nil || len(w.session.stream) == 0 {
				return ""
			}
			i := w.rnd.IntN(len(w.session.stream))
			lost := w.session.stream[i]
			if lost.GetDelta() == nil {
				return ""
			}
			w.session.stream = slices.Delete(w.session.stream, i, i+1)
			return readable(lost)
		}},
		{3, "the server directs", func(w *model) string {
			if w.session == nil {
				return ""
			}
			d := &syncv1.Directive{Directive: &syncv1.Directive_Renew{Renew: &syncv1.Renew{WithinMs: int64(w.rnd.IntN(20_000))}}}
			switch w.rnd.IntN(3) {
			case 0:
				d.Directive = &syncv1.Directive_Reattest{Reattest: &syncv1.Reattest{Reason: "model"}}
				if !w.repeatable {
					return "" // it is not asked of a node that cannot
				}
			case 1:
				d.Directive = &syncv1.Directive_Reconnect{Reconnect: &syncv1.Reconnect{WithinMs: int64(w.rnd.IntN(20_000)), Address: []string{"", fmt.Sprint(w.rnd.IntN(len(w.servers)))}[w.rnd.IntN(2)]}}
			}
			w.session.stream = append(w.session.stream, &syncv1.ServerMessage{Message: &syncv1.ServerMessage_Directive{Directive: d}})
			return readable(w.session.stream[len(w.session.stream)-1])
		}},
		{1, "the agent is banned", func(w *model) string {
			if w.head.node != nil {
				w.commit(func(s *state) { n := *s.node; n.Banned = true; s.node = &n })
			}
			return w.head.name()
		}},
		{1, "the agent is evicted", func(w *model) string {
			w.commit(func(s *state) { s.node = nil })
			return w.head.name()
		}},
		{1, "the agent is killed", func(w *model) string {
			if w.agent != nil {
				token := w.agent.token
				w.agent = nil
				w.start(token)
			}
			return ""
		}},
		{4, "an operator looks after an agent that stopped", func(w *model) string {
			if w.agent == nil {
				w.operate()
			}
			return ""
		}},
		{1, "the agent's disk is full, or is not", func(w *model) string { w.full = !w.full; return fmt.Sprint(w.full) }},
		{1, "the source of roots is away, or is not", func(w *model) string { w.away = !w.away; return fmt.Sprint(w.away) }},
	}
}

// join has a caller come, of whom chance knows something.
func (w *model) join() string {
	key := fmt.Sprintf("s%d", w.rnd.IntN(6))
	if w.agent == nil || w.agent.subs[key] != nil {
		return ""
	}
	facts := entry.Facts{Values: map[string]string{"unix.uid": "1"}}
	for i := range 4 {
		if w.rnd.IntN(4) > 0 {
			facts.Selectors = append(facts.Selectors, entry.Selector{Type: "unix", Value: fmt.Sprintf("uid:%d", i)})
		}
	}
	for _, f := range []struct {
		name   string
		values []string
	}{{"unix.user", []string{"ann", "bob", ""}}, {"unix.program", []string{"web", "a b", ""}}} {
		if v := f.values[w.rnd.IntN(3)]; v != "" {
			facts.Values[f.name] = v
		}
	}
	w.callers[key] = facts
	w.agent.listen(key, facts, w.at.Add(w.skew))
	w.feed(tick{})
	return fmt.Sprint(key, " ", facts)
}
