package supervisor

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
)

// fakeAttempt tells what became of it.
type fakeAttempt struct {
	accept error
	became chan string
}

func (a *fakeAttempt) To() netip.AddrPort { return netip.MustParseAddrPort("[::1]:80") }
func (a *fakeAttempt) Refuse()            { a.became <- "refused" }
func (a *fakeAttempt) Drop()              { a.became <- "dropped" }
func (a *fakeAttempt) Accept(context.Context) (*net.TCPConn, error) {
	a.became <- "accepted"
	return nil, a.accept
}

// fakeForwarded answers when it is told, and says what is done with it.
type fakeForwarded struct {
	answer chan error
	became chan string
	splice chan struct{}
}

func (c *fakeForwarded) Answer() error { return <-c.answer }
func (c *fakeForwarded) Discard() error {
	c.became <- "discarded"
	return nil
}

func (c *fakeForwarded) Splice(*net.TCPConn) error {
	c.became <- "spliced"
	<-c.splice
	return nil
}

func TestForwarderLeads(t *testing.T) {
	answer := func(err error) chan error {
		c := make(chan error, 1)
		c <- err
		return c
	}
	for _, f := range []struct {
		name           string
		open, answer   error
		accept         error
		attempt, guest string
	}{
		{"well", nil, nil, nil, "accepted", "spliced"},
		{"nobody listens", nil, guest.ErrRefused, nil, "refused", ""},
		{"the guest is dead", guest.ErrDead, nil, nil, "refused", ""},
		{"it dies", nil, guest.ErrDead, nil, "refused", ""},
		{"somebody on the host has the address", nil, nil, errors.New("in use"), "accepted", "discarded"},
	} {
		c := &fakeForwarded{answer: answer(f.answer), became: make(chan string, 1), splice: make(chan struct{})}
		close(c.splice)
		a := &fakeAttempt{accept: f.accept, became: make(chan string, 1)}
		fw := &forwarder{open: func(context.Context, netip.AddrPort) (forwarded, error) { return c, f.open }}
		fw.lead(t.Context(), a)
		if got := <-a.became; got != f.attempt {
			t.Errorf("%s: the attempt was %s, want %s", f.name, got, f.attempt)
		}
		got := ""
		select {
		case got = <-c.became:
		default:
		}
		if got != f.guest {
			t.Errorf("%s: the guest's connection was %s, want %s", f.name, got, f.guest)
		}
	}
}

// A guest that answers when nobody waits any more keeps its place until then.
func TestForwarderIsLate(t *testing.T) {
	c := &fakeForwarded{answer: make(chan error), became: make(chan string, 1)}
	a := &fakeAttempt{became: make(chan string, 1)}
	fw := &forwarder{open: func(context.Context, netip.AddrPort) (forwarded, error) { return c, nil }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { fw.lead(ctx, a); close(done) }()
	cancel() // as the time's end
	if got := <-a.became; got != "dropped" {
		t.Error(got)
	}
	select {
	case <-done:
		t.Error("its place is free")
	default:
	}
	c.answer <- nil
	<-done
	if got := <-c.became; got != "discarded" {
		t.Error(got)
	}
}

func TestForwarderIsBounded(t *testing.T) {
	c := &fakeForwarded{answer: make(chan error, 1000), became: make(chan string, 1000), splice: make(chan struct{})}
	fw := &forwarder{open: func(context.Context, netip.AddrPort) (forwarded, error) { return c, nil }}
	a := &fakeAttempt{became: make(chan string, 1000)}
	attempts := make(chan *fakeAttempt)
	end := errors.New("the end")
	served := make(chan error)
	go func() {
		served <- fw.serve(t.Context(), func() (attempt, error) {
			if a := <-attempts; a != nil {
				return a, nil
			}
			return nil, end
		})
	}()
	for range agentv1.MaxForwards {
		attempts <- a
		c.answer <- nil
		if got := <-a.became; got != "accepted" {
			t.Fatal(got)
		}
	}
	attempts <- a
	if got := <-a.became; got != "dropped" {
		t.Errorf("one too many was %s", got)
	}
	// One that has ended makes room.
	c.splice <- struct{}{}
	c.answer <- nil
	for limit := time.Now().Add(20 * time.Second); ; {
		attempts <- a
		if got := <-a.became; got == "accepted" {
			break
		} else if time.Now().After(limit) {
			t.Fatal(got)
		}
	}
	close(attempts)
	if err := <-served; !errors.Is(err, end) {
		t.Error(err)
	}
	close(c.splice)
	fw.wg.Wait()
}

func TestForwardsOfCRI(t *testing.T) {
	for _, f := range []struct {
		annotations map[string]string
		want        bool
	}{
		{nil, false},
		{map[string]string{"io.kubernetes.cri.container-type": "sandbox"}, true},
		{map[string]string{"io.kubernetes.cri-o.ContainerType": "sandbox"}, true},
		{map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "x"}, false},
		{map[string]string{"io.kubernetes.cri.container-type": "what"}, false},
	} {
		if got := forwards(f.annotations); got != f.want {
			t.Errorf("%v: %v", f.annotations, got)
		}
	}
}
