package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// maxInterfaces bounds the network cards of one answer.
const maxInterfaces = 64

func (s *service) StatsContainer(_ context.Context, req *agentv1.StatsContainerRequest) (*agentv1.StatsContainerResponse, error) {
	c, err := s.agent.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	stats, err := c.engine.Stats()
	if err != nil {
		return nil, err
	}
	if stats.Network, err = s.agent.system.Interfaces(); err != nil {
		return nil, err
	}
	return &agentv1.StatsContainerResponse{Stats: stats}, nil
}

func (s *service) UpdateContainer(_ context.Context, req *agentv1.UpdateContainerRequest) (*agentv1.UpdateContainerResponse, error) {
	c, err := s.agent.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := c.engine.Update(req.Resources); err != nil {
		return nil, err
	}
	return &agentv1.UpdateContainerResponse{}, nil
}

func (s *service) WaitOOM(ctx context.Context, req *agentv1.WaitOOMRequest) (*agentv1.WaitOOMResponse, error) {
	c, err := s.agent.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	n, err := c.engine.WaitOOM(ctx, req.After)
	if err != nil {
		return nil, err
	}
	return &agentv1.WaitOOMResponse{Count: n}, nil
}

// Interfaces implements System.
func (g *Guest) Interfaces() ([]*agentv1.NetworkStats, error) {
	// The network of this process's namespace, which is the pod's.
	b, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return nil, fmt.Errorf("read the traffic of the network cards: %w", err)
	}
	return parseNetDev(b), nil
}

// parseNetDev reads /proc/net/dev: two lines of headings, then a name and 16
// numbers a line.
func parseNetDev(b []byte) []*agentv1.NetworkStats {
	var list []*agentv1.NetworkStats
	for line := range bytes.Lines(b) {
		name, rest, ok := strings.Cut(string(line), ":")
		fields := strings.Fields(rest)
		name = strings.TrimSpace(name)
		if !ok || len(fields) < 12 || name == "lo" || len(list) >= maxInterfaces {
			continue
		}
		n := func(i int) uint64 {
			v, _ := strconv.ParseUint(fields[i], 10, 64)
			return v
		}
		list = append(list, &agentv1.NetworkStats{
			Name:    strings.ToValidUTF8(name, "?"),
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11),
		})
	}
	return list
}
