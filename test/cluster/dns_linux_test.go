//go:build kubernetes

package cluster_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// dns answers for the names of services, which CoreDNS does in other clusters.
type dns struct {
	cluster *Cluster
	socket  net.PacketConn
	done    sync.WaitGroup
	known   map[string]netip.Addr // only serve's goroutine touches it
}

func serveDNS(c *Cluster) (*dns, error) {
	socket, err := c.listen(net.JoinHostPort(nodeIP, "53"))
	if err != nil {
		return nil, err
	}
	d := &dns{cluster: c, socket: socket, known: map[string]netip.Addr{}}
	d.done.Go(d.serve)
	return d, nil
}

// listen opens a UDP socket in the machine's network.
func (c *Cluster) listen(address string) (net.PacketConn, error) {
	type opened struct {
		net.PacketConn
		error
	}
	result := make(chan opened)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", c.pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			result <- opened{nil, err}
			return
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			result <- opened{nil, err}
			return
		}
		socket, err := net.ListenPacket("udp", address)
		result <- opened{socket, err}
	}()
	r := <-result
	return r.PacketConn, r.error
}

func (d *dns) close() {
	d.socket.Close()
	d.done.Wait()
}

func (d *dns) serve() {
	buffer := make([]byte, 1500)
	for {
		n, from, err := d.socket.ReadFrom(buffer)
		if err != nil {
			return
		}
		if answer, err := d.answer(buffer[:n]); err == nil {
			_, _ = d.socket.WriteTo(answer, from)
		}
	}
}

func (d *dns) answer(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		return nil, fmt.Errorf("not a query: %w", err)
	}
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	q := m.Questions[0]
	switch address, ok := d.service(q.Name.String()); {
	case !ok:
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 5}, Body: &dnsmessage.AResource{A: address.As4()}}}
	}
	return m.Pack()
}

// service is the address behind NAME.NAMESPACE.svc.cluster.local.
func (d *dns) service(name string) (netip.Addr, bool) {
	labels, ok := strings.CutSuffix(name, ".svc.cluster.local.")
	service, namespace, both := strings.Cut(labels, ".")
	if !ok || !both || strings.Contains(namespace, ".") {
		return netip.Addr{}, false
	}
	if _, ok := d.known[name]; !ok {
		out, err := d.cluster.Kubectl(context.Background(), "", "get", "service", "-n", namespace, service, "-o", "jsonpath={.spec.clusterIP}")
		address, invalid := netip.ParseAddr(out)
		if err != nil || invalid != nil {
			return netip.Addr{}, false
		}
		d.known[name] = address
	}
	return d.known[name], true
}
