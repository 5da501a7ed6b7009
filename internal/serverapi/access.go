package serverapi

import "time"

// kinds is a set of caller kinds. A caller may be several: an SVID's entry can
// say admin and downstream at once.
type kinds uint16

const (
	kindNone       kinds = 1 << iota // TLS without a certificate
	kindLocal                        // on the admin socket
	kindAgent                        // attested, not banned, certificate current
	kindBanned                       // an agent that is banned
	kindExpired                      // an agent whose certificate does not count (expired, replaced, not attested)
	kindAdmin                        // listed in the configuration, or by an entry
	kindDownstream                   // by an entry
	kindWorkload                     // any other identity of ours
)

const (
	anyone    = kindNone | kindLocal | kindAgent | kindBanned | kindExpired | kindAdmin | kindDownstream | kindWorkload
	operators = kindLocal | kindAdmin
)

// queue is one line that calls stand in. Lines do not delay each other: a flood
// of attestations leaves renewals alone (R34).
type queue string

const (
	queueFree      queue = ""       // operators: no limit of ours
	queueAttest    queue = "attest" // anybody may knock
	queueRenew     queue = "renew"
	queueSign      queue = "sign"
	queueRead      queue = "read"
	queueStatus    queue = "status"
	queueSync      queue = "sync" // opening of long streams
	queueHint      queue = "hint"
	queueAuthority queue = "authority" // of downstream servers
)

// rule is one row of the table of RPC by caller kind.
type rule struct {
	who   kinds
	queue queue
	// limit is the longest that a call may take; 0 only for streams that live as
	// long as their caller and end by their own rules.
	limit time.Duration
}

// access is the whole table: what is not here is refused (R15). Services whose
// calls are not offered yet have their rows too, so that a refusal comes before
// the answer that the call does not exist.
func access() map[string]rule {
	const (
		agent  = "/spire.api.server.agent.v1.Agent/"
		bundle = "/spire.api.server.bundle.v1.Bundle/"
		entry  = "/spire.api.server.entry.v1.Entry/"
		local  = "/spire.api.server.localauthority.v1.LocalAuthority/"
		logger = "/spire.api.server.logger.v1.Logger/"
		svid   = "/spire.api.server.svid.v1.SVID/"
		whole  = 10 * time.Minute // it reads the whole store
		long   = 30 * time.Second
		short  = 10 * time.Second
	)
	return map[string]rule{
		agent + "CountAgents":     {operators, queueFree, long},
		agent + "ListAgents":      {operators, queueFree, long},
		agent + "GetAgent":        {operators, queueFree, short},
		agent + "DeleteAgent":     {operators, queueFree, short},
		agent + "BanAgent":        {operators, queueFree, short},
		agent + "AttestAgent":     {anyone, queueAttest, long},
		agent + "RenewAgent":      {kindAgent, queueRenew, short},
		agent + "CreateJoinToken": {operators, queueFree, short},
		agent + "PostStatus":      {kindAgent, queueStatus, short},

		bundle + "CountBundles":               {operators, queueFree, short},
		bundle + "GetBundle":                  {anyone, queueRead, short},
		bundle + "AppendBundle":               {operators, queueFree, short},
		bundle + "PublishJWTAuthority":        {kindDownstream, queueAuthority, short},
		bundle + "PublishWITAuthority":        {kindDownstream, queueSign, short},
		bundle + "ListFederatedBundles":       {operators, queueFree, long},
		bundle + "GetFederatedBundle":         {operators | kindAgent, queueRead, short},
		bundle + "BatchCreateFederatedBundle": {operators, queueFree, long},
		bundle + "BatchUpdateFederatedBundle": {operators, queueFree, long},
		bundle + "BatchSetFederatedBundle":    {operators, queueFree, long},
		bundle + "BatchDeleteFederatedBundle": {operators, queueFree, long},

		entry + "CountEntries":          {operators, queueFree, long},
		entry + "ListEntries":           {operators, queueFree, long},
		entry + "GetEntry":              {operators, queueFree, short},
		entry + "BatchCreateEntry":      {operators, queueFree, long},
		entry + "BatchUpdateEntry":      {operators, queueFree, long},
		entry + "BatchDeleteEntry":      {operators, queueFree, long},
		entry + "GetAuthorizedEntries":  {kindAgent, queueRead, long},
		entry + "SyncAuthorizedEntries": {kindAgent, queueRead, long},

		local + "GetX509AuthorityState":       {operators, queueFree, short},
		local + "PrepareX509Authority":        {operators, queueFree, long},
		local + "ActivateX509Authority":       {operators, queueFree, long},
		local + "TaintX509Authority":          {operators, queueFree, long},
		local + "RevokeX509Authority":         {operators, queueFree, long},
		local + "TaintX509UpstreamAuthority":  {operators, queueFree, long},
		local + "RevokeX509UpstreamAuthority": {operators, queueFree, long},
		local + "GetJWTAuthorityState":        {operators, queueFree, short},
		local + "PrepareJWTAuthority":         {operators, queueFree, long},
		local + "ActivateJWTAuthority":        {operators, queueFree, long},
		local + "TaintJWTAuthority":           {operators, queueFree, long},
		local + "RevokeJWTAuthority":          {operators, queueFree, long},
		local + "GetWITAuthorityState":        {operators, queueFree, short},
		local + "PrepareWITAuthority":         {operators, queueFree, short},
		local + "ActivateWITAuthority":        {operators, queueFree, short},
		local + "TaintWITAuthority":           {operators, queueFree, short},
		local + "RevokeWITAuthority":          {operators, queueFree, short},

		logger + "GetLogger":     {kindLocal, queueFree, short},
		logger + "SetLogLevel":   {kindLocal, queueFree, short},
		logger + "ResetLogLevel": {kindLocal, queueFree, short},

		svid + "MintX509SVID":        {operators, queueFree, short},
		svid + "MintJWTSVID":         {operators, queueFree, short},
		svid + "MintWITSVID":         {operators, queueFree, short},
		svid + "BatchNewX509SVID":    {kindAgent, queueSign, long},
		svid + "NewJWTSVID":          {kindAgent, queueSign, short},
		svid + "BatchNewWITSVID":     {kindAgent, queueSign, long},
		svid + "NewDownstreamX509CA": {kindDownstream, queueAuthority, short},

		"/plastron.apply.v1.Apply/Apply":          {operators, queueFree, long},
		"/plastron.apply.v1.Apply/List":           {operators, queueFree, long},
		"/plastron.authority.v1.Authority/Rotate": {operators, queueFree, maxRotateWait + short},
		"/plastron.authority.v1.Authority/Status": {operators, queueFree, short},
		"/plastron.cutoff.v1.Cutoff/Expel":        {operators, queueFree, long},
		"/plastron.cutoff.v1.Cutoff/Panic":        {operators, queueFree, long},
		"/plastron.cutoff.v1.Cutoff/Revoke":       {operators, queueFree, long},
		"/plastron.issue.v1.Issue/JWT":            {kindAgent, queueSign, short},
		"/plastron.issue.v1.Issue/X509":           {kindAgent, queueSign, long},
		"/plastron.join.v1.Join/Address":          {operators, queueFree, short},
		"/plastron.lifetime.v1.Lifetime/Explain":  {operators, queueFree, long},
		"/plastron.lifetime.v1.Lifetime/Outage":   {operators, queueFree, short},
		"/plastron.node.v1.Node/Attached":         {operators, queueFree, short},
		"/plastron.node.v1.Node/Unban":            {operators, queueFree, short},
		"/plastron.receipt.v1.Receipt/Wait":       {operators, queueFree, maxReceiptWait + short},
		"/plastron.rule.v1.Rules/Create":          {operators, queueFree, long},
		"/plastron.rule.v1.Rules/Delete":          {operators, queueFree, long},
		"/plastron.rule.v1.Rules/List":            {operators, queueFree, long},
		"/plastron.rule.v1.Rules/Show":            {operators, queueFree, short},
		"/plastron.status.v1.Server/List":         {operators, queueFree, short},
		"/plastron.status.v1.Server/Status":       {operators, queueFree, long},
		"/plastron.store.v1.Store/Check":          {kindLocal, queueFree, whole},
		"/plastron.store.v1.Store/Compact":        {kindLocal, queueFree, whole},
		"/plastron.store.v1.Store/Stats":          {kindLocal, queueFree, whole},
		"/plastron.sync.v1.Sync/Follow":           {kindAgent, queueSync, 0},
		"/plastron.why.v1.Entries/Ask":            {operators, queueFree, short},
		"/plastron.why.v1.Entries/Hint":           {kindAgent, queueHint, short},

		"/grpc.health.v1.Health/Check": {kindLocal, queueFree, short},
		"/grpc.health.v1.Health/List":  {kindLocal, queueFree, short},
		"/grpc.health.v1.Health/Watch": {kindLocal, queueFree, short},
	}
}
