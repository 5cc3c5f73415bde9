package supervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/golang/glog"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/guest"
	"github.com/hyperhq/runv/network"
)

// resolveLimit is how long an answer is waited for: longer than resolvers wait
// before they ask again, and than dockerd waits for a server that it asks itself.
const resolveLimit = 15 * time.Second

// resolver lets the pod's programs ask the name server that an engine has in the
// pod's network namespace, at a loopback address: the guest has a loopback of its
// own, and frames cannot get there.
type resolver struct {
	id     string
	file   *os.File // the namespace
	client *guest.Client
	ask    func(ctx context.Context, ns *os.File, transport string, message []byte) ([]byte, error)

	stop func()
	wg   sync.WaitGroup
}

// resolve begins to serve names if the namespace has a name server and nobody
// serves them yet; n.mu is held. A pod without works otherwise, so it is no error.
func (n *podNetwork) resolve() {
	if n.resolver != nil {
		return
	}
	has, err := network.HasResolver(n.file)
	if err == nil && has {
		r := &resolver{id: n.id, file: n.file, client: n.client, ask: network.Resolve}
		if err = r.start(); err == nil {
			n.resolver = r
		}
	}
	if err != nil {
		glog.Warningf("pod %s: names are not served: %v", n.id, err)
	}
}

// start opens the stream to the guest, and serves it until close or the guest's end.
func (r *resolver) start() error {
	ctx, cancel := context.WithCancel(context.Background())
	open, done := context.WithTimeout(ctx, callTimeout)
	defer done()
	s, err := r.client.OpenStream(open, &agentv1.StreamHeader{
		Kind: agentv1.StreamHeader_KIND_RESOLVER, Address: network.ResolverAddress.String(),
	})
	if err != nil {
		cancel()
		return err
	}
	r.stop = func() {
		cancel()
		_ = s.Close()
		// The guest is over, or not to be waited for.
		_ = s.SetDeadline(time.Unix(1, 0))
	}
	r.wg.Go(func() {
		defer cancel()
		if err := r.serve(ctx, s); err != nil && ctx.Err() == nil && !errors.Is(err, guest.ErrDead) {
			glog.Warningf("pod %s: names are not served any more: %v", r.id, err)
		}
		_ = s.Close()
	})
	return nil
}

// serve answers the guest's queries. The guest is bounded by the number of those
// under way: what is too much is not answered, as by any server.
func (r *resolver) serve(ctx context.Context, s io.ReadWriter) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var writing sync.Mutex
	places := make(chan struct{}, agentv1.MaxQueries)
	for {
		var h [agentv1.ResolverHeader]byte
		if _, err := io.ReadFull(s, h[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the guest has ended it: the address may be in use there")
			}
			return err
		}
		transport := "udp"
		switch h[2] {
		case agentv1.ResolverUDP:
		case agentv1.ResolverTCP:
			transport = "tcp"
		default:
			return fmt.Errorf("a query's transport is %d", h[2])
		}
		message := make([]byte, binary.BigEndian.Uint16(h[3:]))
		if _, err := io.ReadFull(s, message); err != nil {
			return err
		}
		select {
		case places <- struct{}{}:
		default:
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			ctx, cancel := context.WithTimeout(ctx, resolveLimit)
			defer cancel()
			answer, err := r.ask(ctx, r.file, transport, message)
			if err != nil {
				if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
					glog.V(1).Infof("pod %s: a name: %v", r.id, err)
				}
				return
			}
			b := binary.BigEndian.AppendUint16(append([]byte{}, h[:3]...), uint16(len(answer)))
			writing.Lock()
			defer writing.Unlock()
			_, _ = s.Write(append(b, answer...)) // its error is that of the next read
		})
	}
}

// close ends it, if there is one, and waits until nothing of it is left.
func (r *resolver) close() {
	if r == nil {
		return
	}
	r.stop()
	r.wg.Wait()
}
